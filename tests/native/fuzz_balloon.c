/* Fuzzes what the balloon does to guest memory: any page numbers, any buffers. What must hold: the
 * pages that are named and are guest memory are zero afterwards, and no other byte has changed,
 * of guest memory or beside it. */
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>

#include "balloon.h"
#include "check.h"
#include "fuzz_input.h"

enum {
    PAGE = BALLOON_PAGE_SIZE,
    PAGES = 64, /* of the host; those of the guest are two runs of them */
    LOW_AT = 8, LOW = 16,
    HIGH_AT = 40, HIGH = 16,
    HIGH_GPA = 100, /* in pages */
    MAX_NUMBERS = 64,
};

static uint8_t *host;
static bool discarded[PAGES];

static uint8_t pattern(size_t page)
{
    return (uint8_t)(page + 1);
}

/* The page of the host that is the guest's number `number`; -1: none. */
static int host_page(uint64_t number)
{
    if (number < LOW)
        return (int)(LOW_AT + number);
    if (number >= HIGH_GPA && number < HIGH_GPA + HIGH)
        return (int)(HIGH_AT + number - HIGH_GPA);
    return -1;
}

static void discard_pages(struct input *input, const struct guest_mem *mem)
{
    uint32_t numbers[MAX_NUMBERS];
    uint32_t count = (uint32_t)take(input, 1) % (MAX_NUMBERS + 1);
    int64_t expected = 0;
    bool counted[PAGES] = {false};

    for (uint32_t i = 0; i < count; i++) {
        int page;

        numbers[i] = (uint32_t)take(input, 1);
        if (numbers[i] >= 0xE0) /* far away */
            numbers[i] = (uint32_t)take(input, 4);
        page = host_page(numbers[i]);
        if (page >= 0) {
            discarded[page] = true;
            expected += !counted[page];
            counted[page] = true;
        }
    }
    CHECK(balloon_discard_pages(mem, numbers, count) == expected);
}

static void discard_buffer(struct input *input, const struct guest_mem *mem)
{
    const struct guest_region *region = &mem->regions[take(input, 1) % mem->count];
    uint64_t start = take(input, 2) % region->size;
    uint64_t size = take(input, 3) % (region->size - start + 1);
    int64_t expected = 0;

    for (uint64_t at = 0; at < region->size; at += PAGE) {
        if (at >= start && at + PAGE <= start + size) {
            discarded[(region->hva + at - host) / PAGE] = true;
            expected++;
        }
    }
    CHECK(balloon_discard_buffer(region->hva + start, size) == expected);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct guest_mem mem;
    uint8_t expected[PAGE];

    if (!host) {
        host = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(host != MAP_FAILED);
    }
    memset(discarded, 0, sizeof(discarded));
    for (size_t page = 0; page < PAGES; page++)
        memset(host + page * PAGE, pattern(page), PAGE);
    mem = (struct guest_mem){
        2,
        {{0, LOW * PAGE, host + LOW_AT * PAGE},
         {HIGH_GPA * PAGE, HIGH * PAGE, host + HIGH_AT * PAGE}},
    };
    while (input.size > 0) {
        if (take(&input, 1) & 1)
            discard_pages(&input, &mem);
        else
            discard_buffer(&input, &mem);
    }
    for (size_t page = 0; page < PAGES; page++) {
        memset(expected, discarded[page] ? 0 : pattern(page), PAGE);
        CHECK(memcmp(host + page * PAGE, expected, PAGE) == 0);
    }
    CHECK(balloon_discard_pages(&mem, NULL, BALLOON_MAX_PAGES + 1) < 0);
    return 0;
}
