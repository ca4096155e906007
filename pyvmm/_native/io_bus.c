#include "io_bus.h"

#include <errno.h>
#include <linux/virtio_mmio.h>
#include <string.h>

#include "virtio_irq.h"

#define REGISTER_PAGE_SIZE 4096

int io_bus_add(struct io_bus *bus, struct io_range *range)
{
    if (bus->count == IO_BUS_MAX_RANGES)
        return -ENOSPC;
    uint32_t at = 0;
    while (at < bus->count && bus->ranges[at]->base < range->base)
        at++;
    if (at > 0 && range->base - bus->ranges[at - 1]->base < bus->ranges[at - 1]->size)
        return -EEXIST;
    if (at < bus->count && bus->ranges[at]->base - range->base < range->size)
        return -EEXIST;
    memmove(&bus->ranges[at + 1], &bus->ranges[at], (bus->count - at) * sizeof(bus->ranges[0]));
    bus->ranges[at] = range;
    bus->count++;
    return 0;
}

/* The last range that begins at or below addr, if all of the access lies in it. */
static struct io_range *find(const struct io_bus *bus, uint64_t addr, uint32_t len)
{
    uint32_t low = 0;
    uint32_t high = bus->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (bus->ranges[middle]->base <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    struct io_range *range = bus->ranges[low - 1];
    uint64_t offset = addr - range->base;
    return offset < range->size && len <= range->size - offset ? range : NULL;
}

enum io_result io_bus_access(const struct io_bus *bus, uint64_t addr, uint8_t *data, uint32_t len,
                             bool is_write)
{
    struct io_range *range = find(bus, addr, len);
    if (!range) {
        if (!is_write)
            memset(data, 0xff, len);
        return IO_UNCLAIMED;
    }
    if (range->access && range->access(range, addr - range->base, data, len, is_write))
        return IO_DONE;
    return IO_PYTHON;
}

static bool virtio_mmio_access(struct io_range *range, uint64_t offset, uint8_t *data,
                               uint32_t len, bool is_write)
{
    struct virtio_mmio_range *mmio = (struct virtio_mmio_range *)range;

    if (!is_write) {
        if (__atomic_load_n(&mmio->trapped, __ATOMIC_ACQUIRE))
            return false;
        memcpy(data, mmio->page + offset, len);
        return true;
    }
    if (offset == VIRTIO_MMIO_INTERRUPT_ACK && len == sizeof(uint32_t)) {
        uint32_t bits;
        memcpy(&bits, data, sizeof(bits));
        virtio_irq_ack(mmio->irq, bits);
        return true;
    }
    return false;
}

void virtio_mmio_range_init(struct virtio_mmio_range *mmio, uint64_t base, const uint8_t *page,
                            struct virtio_irq *irq)
{
    *mmio = (struct virtio_mmio_range){
        .range = {.base = base, .size = REGISTER_PAGE_SIZE, .access = virtio_mmio_access},
        .page = page,
        .irq = irq,
    };
}
