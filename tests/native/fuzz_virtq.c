/* Fuzzes the ring: guest memory is the input, and so is what the device does with it.
 *
 * The input: struct setup, then guest memory. Some memory is changed between the device's steps,
 * as a driver on another CPU could. See fuzz_virtq_seeds.py for the first inputs.
 *
 * What must hold: no access outside guest memory (AddressSanitizer; each region is an allocation
 * of its own), chains that lie in it and are no longer than the queue, at most a queue of them
 * taken and not returned, writes to the used ring alone, and an end to each step. */
#include "fake_driver.h"

#define STEPS 48
#define MAX_CHAIN 256

struct __attribute__((packed)) setup {
    uint8_t size_log2;
    uint8_t features; /* 1 EVENT_IDX, 2 INDIRECT_DESC, 4 indices start near their wrap */
    uint16_t desc_gpa, avail_gpa, used_gpa;
    uint16_t low_size; /* guest memory is in two regions */
    uint8_t steps[STEPS];
};

enum step { POP, PUSH, PUSH_LAST, PUBLISH, DISABLE, ENABLE, ADD, SCRIBBLE };

/* Every buffer can be accessed from its first to its last byte. */
static void check_chain(const struct virtq_chain *chain, uint16_t size)
{
    uint64_t bytes[2] = {0, 0};

    CHECK(chain->head < size && chain->readable + chain->writable <= size);
    for (int i = 0; i < chain->readable + chain->writable; i++) {
        volatile uint8_t *first = chain->iov[i].iov_base;
        volatile uint8_t *last = first + chain->iov[i].iov_len - 1;

        CHECK(chain->iov[i].iov_len > 0);
        (void)*first;
        (void)*last;
        bytes[i >= chain->readable] += chain->iov[i].iov_len;
    }
    CHECK(chain->readable_bytes == bytes[0] && chain->writable_bytes == bytes[1]);
}

/* Guest memory is as it was in `copies`, but for the used ring. */
static void check_untouched(const struct guest_mem *mem, uint8_t *const copies[2],
                            const struct virtq_config *config)
{
    const uint64_t used_size = 6 + 8ull * config->size;

    for (uint32_t r = 0; r < mem->count; r++) {
        const struct guest_region *region = &mem->regions[r];
        uint64_t start = config->used_gpa - region->gpa;

        if (start < region->size)
            memcpy(copies[r] + start, region->hva + start, used_size);
        CHECK(memcmp(copies[r], region->hva, region->size) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct setup setup;
    struct virtq_config config;
    struct guest_mem mem;
    struct virtq vq;
    struct iovec *iov;
    struct virtq_chain chain;
    uint16_t heads[MAX_CHAIN], taken = 0;
    uint8_t *copies[2];
    size_t low_size, used_bytes = 0;

    if (size < sizeof(setup) + 64 || size > sizeof(setup) + 0x2000)
        return -1;
    memcpy(&setup, data, sizeof(setup));
    data += sizeof(setup);
    size -= sizeof(setup);
    low_size = (32 + setup.low_size % (size - 63)) & ~(size_t)15; /* aligned, as pages are */

    config = (struct virtq_config){setup.desc_gpa, setup.avail_gpa, setup.used_gpa,
                                   (uint16_t)(1 << setup.size_log2 % 9), setup.features & 1,
                                   setup.features & 2};
    /* Between the regions is a hole as long as the first. */
    mem = (struct guest_mem){2, {{0, low_size, malloc(low_size)},
                                 {2 * low_size, size - low_size, malloc(size - low_size)}}};
    CHECK(mem.regions[0].hva && mem.regions[1].hva);
    memcpy(mem.regions[0].hva, data, low_size);
    memcpy(mem.regions[1].hva, data + low_size, size - low_size);
    iov = malloc(sizeof(*iov) * config.size);
    copies[0] = malloc(low_size);
    copies[1] = malloc(size - low_size);
    CHECK(iov && copies[0] && copies[1]);
    chain.iov = iov;
    if (virtq_init(&vq, &mem, &config) < 0)
        goto out;
    if (setup.features & 4)
        vq.avail_idx = vq.next_avail = vq.next_used = vq.published_used = 65530;

    for (int i = 0; i < STEPS; i++) {
        struct vring_avail *avail = vq.avail;
        uint8_t argument = setup.steps[i] >> 3;

        memcpy(copies[0], mem.regions[0].hva, low_size);
        memcpy(copies[1], mem.regions[1].hva, size - low_size);
        switch ((enum step)(setup.steps[i] & 7)) {
        case POP:
            if (virtq_pop(&vq, &chain) == VIRTQ_CHAIN) {
                check_chain(&chain, config.size);
                CHECK(taken < config.size);
                heads[taken++] = chain.head;
            }
            break;
        case PUSH:
        case PUSH_LAST:
            if (taken > 0) {
                uint16_t which = (setup.steps[i] & 7) == PUSH ? 0 : taken - 1;

                virtq_push(&vq, heads[which], argument);
                heads[which] = heads[--taken];
            }
            break;
        case PUBLISH:
            virtq_publish(&vq);
            CHECK(!virtq_publish(&vq));
            break;
        case DISABLE:
            virtq_disable_notify(&vq);
            break;
        case ENABLE:
            CHECK(!(virtq_enable_notify(&vq) && vq.broken));
            break;
        case ADD: /* the driver makes `argument` entries available, whatever they hold */
            avail->idx = vq.next_avail + argument;
            continue;
        case SCRIBBLE: /* the driver writes what is written elsewhere in its memory */
            for (int b = 0; b < 8; b++)
                mem.regions[0].hva[(argument * 16 + b) % low_size] =
                    data[(used_bytes++ * 7 + argument) % size];
            continue;
        }
        check_untouched(&mem, copies, &config);
        CHECK((uint16_t)(vq.next_avail - vq.published_used) <= config.size);
    }
out:
    for (int r = 0; r < 2; r++) {
        free(mem.regions[r].hva);
        free(copies[r]);
    }
    free(iov);
    return 0;
}
