/* A driver of a pair of the network device's queues: frames of one descriptor out of its transmit
 * buffers, and mergeable receive buffers. It polls; nobody interrupts it. */
#ifndef PYVMM_TESTS_NET_DRIVER_H
#define PYVMM_TESTS_NET_DRIVER_H

#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include "check.h"
#include "virtio_net.h"
#include "worker.h"

#define NET_QUEUE_SIZE 256u
#define NET_BUFFER 2048u
#define NET_HEADER 12u

struct net_ring {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    uint8_t *buffers; /* NET_BUFFER bytes of each descriptor */
    uint16_t avail_idx, published, used_idx;
    int kick;
};

struct net_driver {
    struct guest_mem mem;
    struct virtq_config config[2]; /* receive, transmit */
    struct net_ring ring[2];
    struct virtio_net_device device;
    struct virtio_irq irq;
    uint32_t irq_status;
    struct virtio_net_pair *pair;
    pthread_t thread;
    int result;
};

static inline void net_ring_offer(struct net_ring *ring, uint16_t id)
{
    ring->avail->ring[ring->avail_idx++ % NET_QUEUE_SIZE] = id;
}

static inline void net_ring_publish(struct net_ring *ring)
{
    uint16_t old = ring->published;
    uint16_t *event = (uint16_t *)&ring->used->ring[NET_QUEUE_SIZE];

    __atomic_store_n(&ring->avail->idx, ring->avail_idx, __ATOMIC_RELEASE);
    ring->published = ring->avail_idx;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (vring_need_event(__atomic_load_n(event, __ATOMIC_RELAXED), ring->avail_idx, old))
        eventfd_signal(ring->kick);
}

/* The next returned element, or NULL. */
static inline const struct vring_used_elem *net_ring_collect(struct net_ring *ring)
{
    if (__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) == ring->used_idx)
        return NULL;
    return &ring->used->ring[ring->used_idx++ % NET_QUEUE_SIZE];
}

/* Where the parts of a ring are in its NET_RING_BYTES. */
#define NET_AVAIL (16ull * NET_QUEUE_SIZE)
#define NET_USED (NET_AVAIL + 8 + 2 * NET_QUEUE_SIZE)
#define NET_BUFFERS ((NET_USED + 6 + 8 * NET_QUEUE_SIZE + 15) & ~15ull)
#define NET_RING_BYTES (NET_BUFFERS + (uint64_t)NET_QUEUE_SIZE * NET_BUFFER)

static inline struct virtq_config net_ring_config(uint64_t base)
{
    return (struct virtq_config){base,           base + NET_AVAIL, base + NET_USED,
                                 NET_QUEUE_SIZE, true,             false};
}

/* The ring at `base` of guest memory, which begins at `ram` and is zero; a descriptor a buffer. */
static inline void net_ring_create(struct net_ring *ring, uint8_t *ram, uint64_t base,
                                   bool writable)
{
    ring->desc = (struct vring_desc *)(ram + base);
    ring->avail = (struct vring_avail *)(ram + base + NET_AVAIL);
    ring->used = (struct vring_used *)(ram + base + NET_USED);
    ring->buffers = ram + base + NET_BUFFERS;
    ring->kick = eventfd(0, EFD_NONBLOCK);
    for (unsigned n = 0; n < NET_QUEUE_SIZE; n++)
        ring->desc[n] = (struct vring_desc){base + NET_BUFFERS + n * NET_BUFFER, NET_BUFFER,
                                            writable ? VRING_DESC_F_WRITE : 0, 0};
}

/* On `fd`, whose frames follow a header if `vnet_hdr`. */
static inline void net_driver_create(struct net_driver *driver, int fd,
                                     enum net_framing framing, bool vnet_hdr)
{
    uint8_t *ram = calloc(2, NET_RING_BYTES);

    CHECK(ram);
    *driver = (struct net_driver){
        .mem = {1, {{0, 2 * NET_RING_BYTES, ram}}},
        .device = {.framing = framing, .vnet_hdr = vnet_hdr, .mergeable = true, .link_up = true,
                   .pcap_fd = -1},
        .irq = {.irqfd = -1},
    };
    driver->irq.status = &driver->irq_status;
    net_filter_init(&driver->device.filter, (const uint8_t[6]){0}, false);
    for (unsigned i = 0; i < 2; i++) {
        driver->config[i] = net_ring_config(i * NET_RING_BYTES);
        net_ring_create(&driver->ring[i], ram, i * NET_RING_BYTES, i == 0);
    }
    driver->pair = virtio_net_pair_create(&driver->device, fd, NULL, &driver->mem,
                                          &driver->config[0], driver->ring[0].kick,
                                          &driver->config[1], driver->ring[1].kick, &driver->irq);
    CHECK(driver->pair);
}

static inline void *net_driver_serve(void *driver)
{
    struct net_driver *self = driver;

    self->result = virtio_net_pair_run(self->pair);
    return NULL;
}

static inline void net_driver_start(struct net_driver *driver)
{
    CHECK(pthread_create(&driver->thread, NULL, net_driver_serve, driver) == 0);
}

/* An enum virtio_net_result. */
static inline int net_driver_stop(struct net_driver *driver)
{
    virtio_net_pair_stop(driver->pair);
    CHECK(pthread_join(driver->thread, NULL) == 0);
    return driver->result;
}

static inline void net_driver_destroy(struct net_driver *driver)
{
    virtio_net_pair_destroy(driver->pair);
    close(driver->ring[0].kick);
    close(driver->ring[1].kick);
    free(driver->mem.regions[0].hva);
}

/* Offers all receive buffers. */
static inline void net_driver_fill(struct net_driver *driver)
{
    for (uint16_t i = 0; i < NET_QUEUE_SIZE; i++)
        net_ring_offer(&driver->ring[0], i);
    net_ring_publish(&driver->ring[0]);
}

#endif
