/* The interrupt of one virtio-mmio device: its InterruptStatus word and its irqfd
 * (virtio 1.2, section 4.2.2).
 *
 * The word lies in the device's register page, which the guest reads without an exit. The guest's
 * InterruptACK writes may be coalesced by KVM: they wait in a ring that all devices share until
 * somebody drains it. A bit that stays set too long makes the driver look at its rings once for
 * nothing; one cleared too early would lose an interrupt. It cannot, because a driver acknowledges
 * before it looks, and an event is published before the ring is drained, which is before its bit is
 * set: an acknowledgement that misses the drain is followed by a look that sees the event
 * (tests/unit/test_interrupt_model.py explores all interleavings). */
#ifndef PYVMM_VIRTIO_IRQ_H
#define PYVMM_VIRTIO_IRQ_H

#include <stdint.h>

/* InterruptStatus bits. */
#define VIRTIO_IRQ_VRING 1u
#define VIRTIO_IRQ_CONFIG 2u

struct ack_ring;

struct virtio_irq {
    uint32_t *status;      /* the InterruptStatus word, in the register page */
    int irqfd;             /* eventfd; -1: nobody to interrupt (tests without KVM) */
    uint64_t ack_gpa;      /* guest-physical address of InterruptACK */
    struct ack_ring *acks; /* NULL: every InterruptACK write exits */
    uint32_t held;         /* see virtio_irq_hold */
};

/* Sets `bits` in InterruptStatus and interrupts the guest. Any thread. What the bits are about must
 * have been made visible before, with a full barrier (virtq_publish has one). */
void virtio_irq_raise(struct virtio_irq *irq, uint32_t bits);

/* Keeps `bits` set in InterruptStatus, whatever the guest acknowledges, for interrupts that are not
 * raised here (vhost); 0 ends that. Any thread. */
void virtio_irq_hold(struct virtio_irq *irq, uint32_t bits);

/* The guest wrote `bits` to InterruptACK, and the write exited. Any thread. */
void virtio_irq_ack(struct virtio_irq *irq, uint32_t bits);

/* The coalesced writes of one VM. `ring` is KVM's page (struct kvm_coalesced_mmio_ring), which
 * must outlive the ack_ring. NULL with errno set on failure. */
struct ack_ring *ack_ring_create(void *ring);
void ack_ring_destroy(struct ack_ring *acks);

/* Attaches an irq, which must stay alive until ack_ring_destroy. 0 or -ENOSPC. */
int ack_ring_attach(struct ack_ring *acks, struct virtio_irq *irq);

#endif
