/* What the balloon does to guest memory: pages go back to the host, and come back zeroed.
 *
 * The mapping stays as it is. Whoever has a pointer into a page that goes (a request of another
 * device that a hostile guest left under way, a ring) finds zeroes in it, or what is written from
 * then on: never anything that is not guest memory. Reads and writes of the kernel that are under
 * way keep the old page until they are done.
 *
 * Only for private anonymous memory: what is shared would come back as it was. */
#ifndef PYVMM_BALLOON_H
#define PYVMM_BALLOON_H

#include <stddef.h>
#include <stdint.h>

#include "guest_mem.h"

#define BALLOON_PAGE_SIZE 4096u /* whatever the page size of guest and host (5.5.6) */
#define BALLOON_MAX_PAGES 4096u

/* Discards the pages with the `count` (up to BALLOON_MAX_PAGES) numbers, in any order. Those that
 * are named twice count once, those outside guest memory not at all. The number of pages, or
 * -errno. */
int64_t balloon_discard_pages(const struct guest_mem *mem, const uint32_t *numbers, uint32_t count);

/* Discards the whole pages in [hva, hva + size), which is guest memory. The number of pages, or
 * -errno. */
int64_t balloon_discard_buffer(void *hva, size_t size);

#endif
