/* The ring where C differs from the reference in Python: real concurrency, real addresses, sizes
 * that only matter to machine integers. What a ring does is in tests/unit/test_virtq.py. */
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake_driver.h"

#define MAX_SIZE 32768

static struct iovec iov[MAX_SIZE];

/* --- sizes --------------------------------------------------------------------------------- */

static void test_the_longest_chain(void)
{
    struct fake_driver driver;
    struct virtq vq;
    struct virtq_chain chain = {.iov = iov};

    for (int indirect = 0; indirect < 2; indirect++) {
        fake_driver_create(&driver, MAX_SIZE, false, (struct fake_shape){MAX_SIZE, 1, indirect});
        CHECK(virtq_init(&vq, &driver.mem, &driver.config) == 0);
        CHECK(fake_driver_add(&driver));
        fake_driver_publish(&driver);
        CHECK(virtq_pop(&vq, &chain) == VIRTQ_CHAIN);
        CHECK(chain.readable == MAX_SIZE - 1 && chain.writable == 1);
        fake_driver_destroy(&driver);
    }
}

static void test_all_indices_in_flight(void)
{
    struct fake_driver driver;
    struct virtq vq;
    struct virtq_chain chain = {.iov = iov};

    fake_driver_create(&driver, MAX_SIZE, true, (struct fake_shape){1, 1, false});
    CHECK(virtq_init(&vq, &driver.mem, &driver.config) == 0);
    for (int round = 0; round < 5; round++) { /* wraps the 16-bit indices twice */
        while (fake_driver_add(&driver))
            ;
        fake_driver_publish(&driver);
        for (int i = 0; i < MAX_SIZE; i++) {
            CHECK(virtq_pop(&vq, &chain) == VIRTQ_CHAIN);
            virtq_push(&vq, chain.head, 1);
        }
        CHECK(virtq_pop(&vq, &chain) == VIRTQ_EMPTY);
        fake_driver_enable_interrupts(&driver);
        CHECK(virtq_publish(&vq));
        CHECK(fake_driver_collect(&driver) == MAX_SIZE);
    }
    fake_driver_destroy(&driver);
}

/* A used length has 32 bits: 4 GiB in one chain is malformed, one byte less is not. */
static void test_four_gigabytes_in_a_chain(void)
{
    const uint64_t buffers = 1ull << 32;
    uint8_t ram[0x400] __attribute__((aligned(16))) = {0};
    /* The ring does not look into buffers, so there need not be any. */
    const struct guest_mem mem = {2, {{0, sizeof(ram), ram}, {buffers, 1ull << 33, (uint8_t *)16}}};
    const struct virtq_config config = {0, 0x100, 0x200, 4, false, false};
    struct vring_desc *desc = (struct vring_desc *)ram;
    struct vring_avail *avail = (struct vring_avail *)(ram + 0x100);
    struct virtq vq;
    struct virtq_chain chain = {.iov = iov};

    desc[0] = (struct vring_desc){buffers, UINT32_MAX, VRING_DESC_F_NEXT, 1};
    desc[1] = (struct vring_desc){buffers, 1, VRING_DESC_F_WRITE, 0};
    desc[2] = (struct vring_desc){buffers, UINT32_MAX - 1, VRING_DESC_F_NEXT, 3};
    desc[3] = (struct vring_desc){buffers, 1, VRING_DESC_F_WRITE, 0};
    avail->ring[0] = 0;
    avail->ring[1] = 2;
    avail->idx = 2;
    CHECK(virtq_init(&vq, &mem, &config) == 0);
    CHECK(virtq_pop(&vq, &chain) == VIRTQ_CHAIN);
    CHECK(vq.malformed == 1 && chain.head == 2);
    CHECK(chain.readable_bytes == UINT32_MAX - 1 && chain.writable_bytes == 1);
}

/* --- addresses ----------------------------------------------------------------------------- */

/* Areas that end where guest memory ends, which is where AddressSanitizer looks. */
static void test_areas_at_the_very_end(void)
{
    const uint64_t desc_gpa = 0x1000, avail_gpa = 0x3000, used_gpa = 0x5000;
    struct guest_mem mem = {3, {{desc_gpa, 16 * 2, malloc(16 * 2)},
                                {avail_gpa, 6 + 2 * 2, malloc(6 + 2 * 2)},
                                {used_gpa, 6 + 8 * 2, calloc(1, 6 + 8 * 2)}}};
    struct virtq_config config = {desc_gpa, avail_gpa, used_gpa, 2, true, false};
    struct vring_desc *desc = (struct vring_desc *)mem.regions[0].hva;
    struct vring_avail *avail = (struct vring_avail *)mem.regions[1].hva;
    struct virtq vq;
    struct virtq_chain chain = {.iov = malloc(sizeof(struct iovec) * 2)};

    CHECK(mem.regions[0].hva && mem.regions[1].hva && mem.regions[2].hva && chain.iov);
    desc[0] = (struct vring_desc){desc_gpa, 32, VRING_DESC_F_NEXT, 1};
    desc[1] = (struct vring_desc){used_gpa + 21, 1, VRING_DESC_F_WRITE, 0};
    avail->ring[0] = avail->ring[1] = 0;
    avail->ring[2] = 0;
    avail->idx = 2;
    CHECK(virtq_init(&vq, &mem, &config) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(virtq_pop(&vq, &chain) == VIRTQ_CHAIN);
        CHECK(chain.iov[0].iov_base == desc && chain.iov[1].iov_len == 1);
        virtq_push(&vq, chain.head, 1);
    }
    CHECK(virtq_publish(&vq));
    virtq_disable_notify(&vq);
    CHECK(!virtq_enable_notify(&vq));

    config.size = 4;
    CHECK(virtq_init(&vq, &mem, &config) < 0);
    for (int i = 0; i < 3; i++)
        free(mem.regions[i].hva);
    free(chain.iov);
}

/* Indirect tables need no alignment. */
static void test_a_table_at_any_address(void)
{
    uint8_t ram[0x400] __attribute__((aligned(16))) = {0};
    const struct guest_mem mem = {1, {{0, sizeof(ram), ram}}};
    const struct virtq_config config = {0, 0x100, 0x180, 4, false, true};
    const struct vring_desc link = {0x300, 8, 0, 0};
    struct vring_desc *desc = (struct vring_desc *)ram;
    struct vring_avail *avail = (struct vring_avail *)(ram + 0x100);
    struct virtq vq;
    struct virtq_chain chain = {.iov = iov};

    CHECK(virtq_init(&vq, &mem, &config) == 0);
    for (uint16_t offset = 0; offset < 16; offset++) {
        memcpy(ram + 0x201 + offset, &link, sizeof(link));
        desc[0] = (struct vring_desc){0x201 + offset, 16, VRING_DESC_F_INDIRECT, 0};
        avail->idx++;
        CHECK(virtq_pop(&vq, &chain) == VIRTQ_CHAIN);
        CHECK(chain.readable_bytes == 8 && chain.iov[0].iov_base == ram + 0x300);
        virtq_push(&vq, chain.head, 0);
        virtq_publish(&vq);
    }
}

/* --- two threads --------------------------------------------------------------------------- */

#define CHAINS 100000u

/* Waits for an eventfd. A wait of five seconds is a lost wake-up. */
static void wait_for(int fd)
{
    struct pollfd pollfd = {fd, POLLIN, 0};
    uint64_t count;

    CHECK(poll(&pollfd, 1, 5000) == 1);
    CHECK(read(fd, &count, sizeof(count)) == sizeof(count));
}

static void wake(int fd)
{
    const uint64_t one = 1;

    CHECK(write(fd, &one, sizeof(one)) == sizeof(one));
}

struct stress {
    struct fake_driver driver;
    struct virtq vq;
    int kick;
    int interrupt;
};

static void *device_thread(void *data)
{
    struct stress *stress = data;
    struct virtq *vq = &stress->vq;
    struct iovec storage[64];
    struct virtq_chain chain = {.iov = storage};
    unsigned served = 0;

    while (served < CHAINS) {
        wait_for(stress->kick);
        do {
            virtq_disable_notify(vq);
            while (virtq_pop(vq, &chain) == VIRTQ_CHAIN) {
                virtq_push(vq, chain.head, 1);
                if (++served % 7 == 0 && virtq_publish(vq))
                    wake(stress->interrupt);
            }
            if (virtq_publish(vq))
                wake(stress->interrupt);
        } while (virtq_enable_notify(vq));
        CHECK(!vq->broken && vq->malformed == 0);
    }
    return NULL;
}

/* Each side sleeps whenever the handshake says that it may. */
static void test_no_wakeup_is_lost(bool event_idx, struct fake_shape shape)
{
    struct stress stress;
    struct fake_driver *driver = &stress.driver;
    unsigned added = 0, collected = 0;
    pthread_t thread;

    fake_driver_create(driver, 64, event_idx, shape);
    CHECK(virtq_init(&stress.vq, &driver->mem, &driver->config) == 0);
    stress.kick = eventfd(0, EFD_CLOEXEC);
    stress.interrupt = eventfd(0, EFD_CLOEXEC);
    CHECK(pthread_create(&thread, NULL, device_thread, &stress) == 0);
    while (collected < CHAINS) {
        unsigned leave = added % 4; /* in flight when the next batch is added */

        for (unsigned batch = 1 + added % 5; batch > 0 && added < CHAINS; batch--, added++)
            CHECK(fake_driver_add(driver));
        if (driver->avail_idx != driver->published_avail && fake_driver_publish(driver))
            wake(stress.kick);
        /* Looks often before it sleeps, so that its next batch comes when the device has just
         * found the ring empty. */
        fake_driver_disable_interrupts(driver);
        for (unsigned looks = added % 997; looks > 0 && added - collected > leave; looks--)
            collected += fake_driver_collect(driver);
        while (added - collected > (added < CHAINS ? leave : 0)) {
            if (!fake_driver_enable_interrupts(driver))
                wait_for(stress.interrupt);
            fake_driver_disable_interrupts(driver);
            collected += fake_driver_collect(driver);
        }
    }
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(stress.vq.chains == CHAINS && collected == CHAINS);
    close(stress.kick);
    close(stress.interrupt);
    fake_driver_destroy(driver);
}

static bool scribbling;

/* A guest that changes descriptors under the device's eyes: what was checked must be what is used. */
static void *scribbler_thread(void *data)
{
    struct fake_driver *driver = data;
    const struct vring_desc good = driver->desc[0];

    for (uint64_t i = 0; __atomic_load_n(&scribbling, __ATOMIC_RELAXED); i++) {
        __atomic_store_n(&driver->desc[0].addr, i & 1 ? UINT64_MAX - 3 : good.addr, __ATOMIC_RELAXED);
        __atomic_store_n(&driver->desc[0].len, i & 2 ? UINT32_MAX : good.len, __ATOMIC_RELAXED);
        __atomic_store_n(&driver->desc[0].flags, (uint16_t)(i >> 2), __ATOMIC_RELAXED);
        __atomic_store_n(&driver->desc[0].next, (uint16_t)(i >> 3), __ATOMIC_RELAXED);
    }
    return NULL;
}

static void test_descriptors_that_change_while_they_are_read(void)
{
    struct fake_driver driver;
    const uint8_t *ram, *end;
    struct virtq vq;
    struct virtq_chain chain = {.iov = iov};
    pthread_t thread;

    fake_driver_create(&driver, 4, false, (struct fake_shape){1, 8, false});
    driver.config.indirect = true;
    ram = driver.mem.regions[0].hva;
    end = ram + driver.mem.regions[0].size;
    CHECK(virtq_init(&vq, &driver.mem, &driver.config) == 0);
    __atomic_store_n(&scribbling, true, __ATOMIC_RELAXED);
    CHECK(pthread_create(&thread, NULL, scribbler_thread, &driver) == 0);
    for (unsigned i = 0; vq.chains < 20000 || vq.malformed < 20000; i++) {
        __atomic_store_n(&driver.avail->ring[i % 4], 0, __ATOMIC_RELAXED);
        __atomic_store_n(&driver.avail->idx, (uint16_t)(i + 1), __ATOMIC_RELEASE);
        if (virtq_pop(&vq, &chain) == VIRTQ_CHAIN) {
            CHECK(chain.readable + chain.writable <= 4);
            for (int part = 0; part < chain.readable + chain.writable; part++) {
                const uint8_t *start = iov[part].iov_base;

                CHECK(start >= ram && start < end && iov[part].iov_len <= (size_t)(end - start));
            }
            virtq_push(&vq, chain.head, 0);
        }
        virtq_publish(&vq);
    }
    CHECK(!vq.broken);
    __atomic_store_n(&scribbling, false, __ATOMIC_RELAXED);
    CHECK(pthread_join(thread, NULL) == 0);
    fake_driver_destroy(&driver);
}

int main(void)
{
    test_the_longest_chain();
    test_all_indices_in_flight();
    test_four_gigabytes_in_a_chain();
    test_areas_at_the_very_end();
    test_a_table_at_any_address();
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        test_no_wakeup_is_lost(event_idx, (struct fake_shape){1, 64, false});
        test_no_wakeup_is_lost(event_idx, (struct fake_shape){3, 64, true});
    }
    test_descriptors_that_change_while_they_are_read();
    return 0;
}
