/* Guest-physical to host-virtual translation: the one place where a guest address becomes a pointer. */
#ifndef PYVMM_GUEST_MEM_H
#define PYVMM_GUEST_MEM_H

#include <stddef.h>
#include <stdint.h>

#define GUEST_MEM_MAX_REGIONS 4

struct guest_region {
    uint64_t gpa;
    uint64_t size;
    uint8_t *hva;
};

/* Regions are sorted, do not overlap and never touch (there is a hole between any two), so a
 * buffer that does not fit into one region is not in guest memory. Frozen before the first use. */
struct guest_mem {
    uint32_t count;
    struct guest_region regions[GUEST_MEM_MAX_REGIONS];
};

/* The host address of `size` bytes at `gpa`, or NULL unless all of them are guest memory. */
static inline void *guest_mem_at(const struct guest_mem *mem, uint64_t gpa, uint64_t size)
{
    const struct guest_region *end = mem->regions + mem->count;
    for (const struct guest_region *region = mem->regions; region < end; region++) {
        uint64_t offset = gpa - region->gpa; /* wraps to a huge value when gpa is below the region */
        if (offset < region->size && size <= region->size - offset)
            return region->hva + offset;
    }
    return NULL;
}

#endif
