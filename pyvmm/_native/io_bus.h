/* Which C code, if any, answers a guest access to an I/O port or an MMIO address. */
#ifndef PYVMM_IO_BUS_H
#define PYVMM_IO_BUS_H

#include <stdbool.h>
#include <stdint.h>

#define IO_BUS_MAX_RANGES 128

struct virtio_irq;

struct io_range {
    uint64_t base;
    uint64_t size;
    /* Serves one access of `len` bytes (1, 2, 4 or 8) that lies in the range; `data` is read for
     * a write and filled for a read. False: the access is Python's, as for a NULL function. Runs
     * on vCPU threads, several at once. */
    bool (*access)(struct io_range *range, uint64_t offset, uint8_t *data, uint32_t len,
                   bool is_write);
};

/* Sorted by base; frozen while vCPUs run. */
struct io_bus {
    uint32_t count;
    struct io_range *ranges[IO_BUS_MAX_RANGES];
};

/* 0, -ENOSPC, or -EEXIST when the range overlaps another. The range must outlive the bus. */
int io_bus_add(struct io_bus *bus, struct io_range *range);

enum io_result {
    IO_DONE,
    IO_PYTHON,    /* a Python device claims it */
    IO_UNCLAIMED, /* nobody does: `data` of a read is all ones */
};

enum io_result io_bus_access(const struct io_bus *bus, uint64_t addr, uint8_t *data, uint32_t len,
                             bool is_write);

/* The register page of a virtio-mmio device: reads come from the page (they exit only where KVM
 * lacks read-only memory slots), InterruptACK goes to the irq, all other writes are Python's.
 * While `trapped`, reads are Python's too: it is changing several registers that must be seen to
 * change together. */
struct virtio_mmio_range {
    struct io_range range;
    bool trapped; /* atomic */
    const uint8_t *page;
    struct virtio_irq *irq;
};

void virtio_mmio_range_init(struct virtio_mmio_range *mmio, uint64_t base, const uint8_t *page,
                            struct virtio_irq *irq);

#endif
