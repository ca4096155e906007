#include "balloon.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int compare_numbers(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;

    return (left > right) - (left < right);
}

/* Discards what is guest memory of [gpa, gpa + size): one system call a region, which splits a
 * transparent huge page and makes the vCPUs forget translations once, and not for each page. */
static int64_t discard_run(const struct guest_mem *mem, uint64_t gpa, uint64_t size)
{
    const struct guest_region *end = mem->regions + mem->count;
    int64_t pages = 0;

    for (const struct guest_region *region = mem->regions; region < end; region++) {
        uint64_t from = gpa > region->gpa ? gpa : region->gpa;
        uint64_t to = gpa + size < region->gpa + region->size ? gpa + size
                                                             : region->gpa + region->size;
        int64_t done;

        if (from >= to)
            continue;
        done = balloon_discard_buffer(region->hva + (from - region->gpa), to - from);
        if (done < 0)
            return done;
        pages += done;
    }
    return pages;
}

int64_t balloon_discard_pages(const struct guest_mem *mem, const uint32_t *numbers, uint32_t count)
{
    uint32_t sorted[BALLOON_MAX_PAGES];
    int64_t pages = 0;

    if (count > BALLOON_MAX_PAGES)
        return -EINVAL;
    memcpy(sorted, numbers, count * sizeof(*sorted));
    qsort(sorted, count, sizeof(*sorted), compare_numbers);
    for (uint32_t first = 0, next; first < count; first = next) {
        uint64_t run;
        int64_t done;

        for (next = first + 1; next < count && sorted[next] - sorted[next - 1] <= 1; next++)
            ;
        run = sorted[next - 1] - sorted[first] + 1ull;
        done = discard_run(mem, (uint64_t)sorted[first] * BALLOON_PAGE_SIZE,
                           run * BALLOON_PAGE_SIZE);
        if (done < 0)
            return done;
        pages += done;
    }
    return pages;
}

int64_t balloon_discard_buffer(void *hva, size_t size)
{
    uintptr_t start = ((uintptr_t)hva + BALLOON_PAGE_SIZE - 1) & -(uintptr_t)BALLOON_PAGE_SIZE;
    uintptr_t end = ((uintptr_t)hva + size) & -(uintptr_t)BALLOON_PAGE_SIZE;

    if (start >= end)
        return 0;
    if (madvise((void *)start, end - start, MADV_DONTNEED) < 0)
        return -errno;
    return (int64_t)((end - start) / BALLOON_PAGE_SIZE);
}
