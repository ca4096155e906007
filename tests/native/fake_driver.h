/* The driver side of a split virtqueue, on another thread than the device's if need be: the
 * barriers are a driver's (virtio 1.2, 2.7.13 and 2.7.14). All chains have the same shape
 * and share one buffer (and one indirect table), so that their descriptors are written once. */
#ifndef PYVMM_TESTS_FAKE_DRIVER_H
#define PYVMM_TESTS_FAKE_DRIVER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_ring.h>

#include "check.h"
#include "virtq.h"

struct fake_driver {
    struct guest_mem mem;
    struct virtq_config config;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint16_t avail_idx;
    uint16_t published_avail;
    uint16_t used_idx;
    uint16_t *free_heads;
    uint16_t free_count;
};

struct fake_shape {
    uint16_t descriptors; /* of `length` bytes; the last one is device-writable */
    uint32_t length;
    bool indirect;
};

static inline void fake_driver_link(struct vring_desc *table, uint16_t first, uint64_t buffer,
                                    struct fake_shape shape)
{
    for (uint16_t i = 0; i < shape.descriptors; i++) {
        bool last = i + 1 == shape.descriptors;

        table[first + i] = (struct vring_desc){
            .addr = buffer,
            .len = shape.length,
            .flags = last ? VRING_DESC_F_WRITE : VRING_DESC_F_NEXT,
            .next = last ? 0 : first + i + 1,
        };
    }
}

static inline void fake_driver_create(struct fake_driver *driver, uint16_t size, bool event_idx,
                                      struct fake_shape shape)
{
    uint64_t avail = 16ull * size;
    uint64_t used = (avail + 6 + 2 * size + 3) & ~3ull;
    uint64_t table = (used + 6 + 8 * size + 15) & ~15ull;
    uint64_t table_size = shape.indirect ? 16ull * shape.descriptors : 0;
    uint64_t buffer = table + table_size;
    uint16_t stride = shape.indirect ? 1 : shape.descriptors;
    uint8_t *ram = calloc(1, buffer + shape.length);

    CHECK(ram);
    *driver = (struct fake_driver){
        .mem = {1, {{0, buffer + shape.length, ram}}},
        .config = {0, avail, used, size, event_idx, shape.indirect},
        .desc = (struct vring_desc *)ram,
        .avail = (struct vring_avail *)(ram + avail),
        .used = (struct vring_used *)(ram + used),
        .free_heads = malloc(sizeof(uint16_t) * size),
    };
    CHECK(driver->free_heads);
    for (uint16_t head = 0; head + stride <= size; head += stride) {
        if (shape.indirect)
            driver->desc[head] = (struct vring_desc){
                .addr = table, .len = (uint32_t)table_size, .flags = VRING_DESC_F_INDIRECT};
        else
            fake_driver_link(driver->desc, head, buffer, shape);
        driver->free_heads[driver->free_count++] = head;
    }
    if (shape.indirect)
        fake_driver_link((struct vring_desc *)(ram + table), 0, buffer, shape);
}

static inline void fake_driver_destroy(struct fake_driver *driver)
{
    free(driver->mem.regions[0].hva);
    free(driver->free_heads);
}

/* Puts a chain into the available ring, not yet visible. False when all are in flight. */
static inline bool fake_driver_add(struct fake_driver *driver)
{
    if (driver->free_count == 0)
        return false;
    __atomic_store_n(&driver->avail->ring[driver->avail_idx++ & (driver->config.size - 1)],
                     driver->free_heads[--driver->free_count], __ATOMIC_RELAXED);
    return true;
}

/* Shows the device all that was added. True when it wants to be notified. */
static inline bool fake_driver_publish(struct fake_driver *driver)
{
    uint16_t old = driver->published_avail, size = driver->config.size;

    __atomic_store_n(&driver->avail->idx, driver->avail_idx, __ATOMIC_RELEASE);
    driver->published_avail = driver->avail_idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (driver->config.event_idx) {
        uint16_t *avail_event = (uint16_t *)&driver->used->ring[size];

        return vring_need_event(__atomic_load_n(avail_event, __ATOMIC_RELAXED),
                                driver->avail_idx, old);
    }
    return !(__atomic_load_n(&driver->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
}

/* Takes back what the device returned: the number of chains. */
static inline unsigned fake_driver_collect(struct fake_driver *driver)
{
    uint16_t idx = __atomic_load_n(&driver->used->idx, __ATOMIC_ACQUIRE);
    unsigned count = 0;

    for (; driver->used_idx != idx; driver->used_idx++, count++) {
        struct vring_used_elem *elem = &driver->used->ring[driver->used_idx &
                                                           (driver->config.size - 1)];

        CHECK(driver->free_count < driver->config.size);
        driver->free_heads[driver->free_count++] =
            (uint16_t)__atomic_load_n(&elem->id, __ATOMIC_RELAXED);
    }
    return count;
}

static inline void fake_driver_disable_interrupts(struct fake_driver *driver)
{
    if (!driver->config.event_idx)
        __atomic_store_n(&driver->avail->flags, VRING_AVAIL_F_NO_INTERRUPT, __ATOMIC_RELAXED);
}

/* Asks for an interrupt. True when chains came back meanwhile: collect again. */
static inline bool fake_driver_enable_interrupts(struct fake_driver *driver)
{
    if (driver->config.event_idx)
        __atomic_store_n(&driver->avail->ring[driver->config.size], driver->used_idx,
                         __ATOMIC_RELAXED);
    else
        __atomic_store_n(&driver->avail->flags, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&driver->used->idx, __ATOMIC_RELAXED) != driver->used_idx;
}

#endif
