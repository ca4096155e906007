/* The interrupt of one virtio-mmio device: its InterruptStatus word and its irqfd
 * (virtio 1.2, section 4.2.2). */
#ifndef PYVMM_VIRTIO_IRQ_H
#define PYVMM_VIRTIO_IRQ_H

#include <stdint.h>

/* InterruptStatus bits. */
#define VIRTIO_IRQ_VRING 1u
#define VIRTIO_IRQ_CONFIG 2u

struct ack_ring; /* InterruptACK writes that KVM coalesced, see virtio_irq.c */

struct virtio_irq {
    uint32_t *status;      /* the InterruptStatus word, shared with the guest's register page */
    int irqfd;             /* eventfd; -1 in tests without KVM */
    uint64_t ack_gpa;      /* guest-physical address of InterruptACK */
    struct ack_ring *acks; /* NULL: every InterruptACK write exits */
};

/* Sets `bits` in InterruptStatus and interrupts the guest. Any thread. */
void virtio_irq_raise(struct virtio_irq *irq, uint32_t bits);

/* The guest wrote `bits` to InterruptACK. */
void virtio_irq_ack(struct virtio_irq *irq, uint32_t bits);

#endif
