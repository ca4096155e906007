#include "virtio_irq.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker.h"

#define MAX_IRQS 256

struct ack_ring {
    pthread_mutex_t lock;
    struct kvm_coalesced_mmio_ring *ring;
    uint32_t entries;
    uint32_t count;
    struct virtio_irq *irqs[MAX_IRQS];
};

struct ack_ring *ack_ring_create(void *ring)
{
    struct ack_ring *acks = calloc(1, sizeof(*acks));
    if (!acks)
        return NULL;
    pthread_mutex_init(&acks->lock, NULL);
    acks->ring = ring;
    /* KVM_COALESCED_MMIO_MAX of linux/kvm_host.h */
    acks->entries = ((uint32_t)sysconf(_SC_PAGESIZE) - sizeof(*acks->ring)) /
                    sizeof(struct kvm_coalesced_mmio);
    return acks;
}

void ack_ring_destroy(struct ack_ring *acks)
{
    if (!acks)
        return;
    pthread_mutex_destroy(&acks->lock);
    free(acks);
}

int ack_ring_attach(struct ack_ring *acks, struct virtio_irq *irq)
{
    if (acks->count == MAX_IRQS)
        return -ENOSPC;
    acks->irqs[acks->count++] = irq;
    irq->acks = acks;
    return 0;
}

static void clear_bits(struct virtio_irq *irq, uint32_t bits)
{
    bits &= ~__atomic_load_n(&irq->held, __ATOMIC_SEQ_CST);
    __atomic_fetch_and(irq->status, ~bits, __ATOMIC_SEQ_CST);
}

/* Applies the waiting acknowledgements. Lock held. */
static void drain(struct ack_ring *acks)
{
    struct kvm_coalesced_mmio_ring *ring = acks->ring;
    uint32_t first = ring->first;
    /* Pairs with the smp_wmb before ring->last in KVM's coalesced_mmio_write. */
    uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);

    while (first != last) {
        const struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[first];
        uint32_t bits = 0;
        if (entry->len == sizeof(bits))
            memcpy(&bits, entry->data, sizeof(bits));
        for (uint32_t i = 0; i < acks->count; i++) {
            if (acks->irqs[i]->ack_gpa == entry->phys_addr) {
                clear_bits(acks->irqs[i], bits);
                break;
            }
        }
        first = (first + 1) % acks->entries;
    }
    /* KVM may reuse the entries only after they were read. */
    __atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
}

void virtio_irq_raise(struct virtio_irq *irq, uint32_t bits)
{
    if (irq->acks) {
        pthread_mutex_lock(&irq->acks->lock);
        drain(irq->acks);
        __atomic_fetch_or(irq->status, bits, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&irq->acks->lock);
    } else {
        __atomic_fetch_or(irq->status, bits, __ATOMIC_SEQ_CST);
    }
    if (irq->irqfd >= 0)
        eventfd_signal(irq->irqfd);
}

void virtio_irq_hold(struct virtio_irq *irq, uint32_t bits)
{
    __atomic_store_n(&irq->held, bits, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(irq->status, bits, __ATOMIC_SEQ_CST);
}

void virtio_irq_ack(struct virtio_irq *irq, uint32_t bits)
{
    if (irq->acks) {
        pthread_mutex_lock(&irq->acks->lock);
        drain(irq->acks);
        clear_bits(irq, bits);
        pthread_mutex_unlock(&irq->acks->lock);
    } else {
        clear_bits(irq, bits);
    }
}
