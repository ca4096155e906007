/* No interrupt is lost between devices that raise and a guest that acknowledges through KVM's
 * coalescing ring: the protocol that tests/unit/test_interrupt_model.py explores, at full speed. */
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "virtio_irq.h"

#define DEVICES 2
#define WORKERS 2 /* of each device */
#define EVENTS 20000u
#define ACK_GPA(device) (0xD0000064u + (device) * 0x1000u)

static struct kvm_coalesced_mmio_ring *ring;
static uint32_t ring_entries;
static struct virtio_irq irqs[DEVICES];
static uint32_t published[DEVICES], handled[DEVICES];
static bool stopping;

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* KVM's page, as the kernel lays it out. Without coalescing it is as good as always full. */
static void create_ring(bool coalesced)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);

    ring = aligned_alloc(page, page);
    CHECK(ring);
    ring->first = ring->last = 0;
    ring_entries = coalesced ? (uint32_t)((page - sizeof(*ring)) / sizeof(struct kvm_coalesced_mmio))
                             : 1;
}

/* coalesced_mmio_write of the kernel; a full ring lets the write exit. */
static void write_ack(int device, uint32_t bits)
{
    uint32_t last = ring->last, next = (last + 1) % ring_entries;
    struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[last];

    if (next == __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE)) {
        virtio_irq_ack(&irqs[device], bits);
        return;
    }
    entry->phys_addr = ACK_GPA(device);
    entry->len = sizeof(bits);
    memcpy(entry->data, &bits, sizeof(bits));
    __atomic_store_n(&ring->last, next, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* entering the guest again is one */
}

/* vm_interrupt of Linux's virtio_mmio.c. */
static void interrupt(int device)
{
    uint32_t status = __atomic_load_n(irqs[device].status, __ATOMIC_RELAXED);

    if (status == 0)
        return;
    write_ack(device, status);
    if (status & VIRTIO_IRQ_VRING)
        __atomic_store_n(&handled[device],
                         __atomic_load_n(&published[device], __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
}

static void *guest_thread(void *data)
{
    struct pollfd pollfds[DEVICES];

    (void)data;
    for (int i = 0; i < DEVICES; i++)
        pollfds[i] = (struct pollfd){irqs[i].irqfd, POLLIN, 0};
    while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED)) {
        CHECK(poll(pollfds, DEVICES, 100) >= 0);
        for (int i = 0; i < DEVICES; i++) {
            uint64_t count;

            if (pollfds[i].revents == 0)
                continue;
            CHECK(read(irqs[i].irqfd, &count, sizeof(count)) == sizeof(count));
            interrupt(i);
        }
    }
    return NULL;
}

static void *worker_thread(void *data)
{
    struct virtio_irq *irq = data;
    int device = (int)(irq - irqs);

    for (unsigned i = 0; i < EVENTS; i++) {
        uint32_t event = __atomic_add_fetch(&published[device], 1, __ATOMIC_SEQ_CST);
        double deadline = 0;

        virtio_irq_raise(irq, VIRTIO_IRQ_VRING);
        if (i % 3 == 0)
            continue; /* the next one comes while the guest is at this one */
        while ((int32_t)(__atomic_load_n(&handled[device], __ATOMIC_ACQUIRE) - event) < 0) {
            if (deadline == 0)
                deadline = now() + 5;
            CHECK(now() < deadline); /* else the interrupt is lost */
            sched_yield();
        }
    }
    return NULL;
}

static void test_no_interrupt_is_lost(bool coalesced)
{
    struct ack_ring *acks = NULL;
    uint32_t words[DEVICES] = {0};
    pthread_t guest, workers[DEVICES * WORKERS];

    create_ring(coalesced);
    if (coalesced) {
        acks = ack_ring_create(ring);
        CHECK(acks);
    }
    memset(published, 0, sizeof(published));
    memset(handled, 0, sizeof(handled));
    stopping = false;
    for (int i = 0; i < DEVICES; i++) {
        irqs[i] = (struct virtio_irq){&words[i], eventfd(0, EFD_NONBLOCK), ACK_GPA(i), NULL, 0};
        if (acks)
            CHECK(ack_ring_attach(acks, &irqs[i]) == 0);
    }
    CHECK(pthread_create(&guest, NULL, guest_thread, NULL) == 0);
    for (int i = 0; i < DEVICES * WORKERS; i++)
        CHECK(pthread_create(&workers[i], NULL, worker_thread, &irqs[i % DEVICES]) == 0);
    for (int i = 0; i < DEVICES * WORKERS; i++)
        CHECK(pthread_join(workers[i], NULL) == 0);
    __atomic_store_n(&stopping, true, __ATOMIC_RELAXED);
    CHECK(pthread_join(guest, NULL) == 0);
    for (int i = 0; i < DEVICES; i++)
        close(irqs[i].irqfd);
    ack_ring_destroy(acks);
    free(ring);
}

static void test_waiting_acks_are_applied_before_the_next_raise(void)
{
    uint32_t words[DEVICES] = {VIRTIO_IRQ_VRING | VIRTIO_IRQ_CONFIG, VIRTIO_IRQ_VRING};
    struct ack_ring *acks;

    create_ring(true);
    acks = ack_ring_create(ring);
    CHECK(acks);
    for (int i = 0; i < DEVICES; i++) {
        irqs[i] = (struct virtio_irq){&words[i], -1, ACK_GPA(i), NULL, 0};
        CHECK(ack_ring_attach(acks, &irqs[i]) == 0);
    }
    write_ack(0, VIRTIO_IRQ_CONFIG);
    write_ack(1, VIRTIO_IRQ_VRING);
    CHECK(words[0] == (VIRTIO_IRQ_VRING | VIRTIO_IRQ_CONFIG) && words[1] == VIRTIO_IRQ_VRING);
    virtio_irq_raise(&irqs[1], VIRTIO_IRQ_CONFIG);
    CHECK(words[0] == VIRTIO_IRQ_VRING && words[1] == VIRTIO_IRQ_CONFIG);
    virtio_irq_ack(&irqs[0], VIRTIO_IRQ_VRING);
    CHECK(words[0] == 0);
    ack_ring_destroy(acks);
    free(ring);
}

int main(void)
{
    test_waiting_acks_are_applied_before_the_next_raise();
    test_no_interrupt_is_lost(false);
    test_no_interrupt_is_lost(true);
    return 0;
}
