/* Throw-away writes: where each sector of a disk lies that must not change its image.
 *
 * A sector comes from the base image until it is first written, discarded or zeroed; from then on
 * it lies in the overlay, a sparse file, at the same offset. The map has a bit for each sector, the
 * smallest unit that a guest writes. So nothing is ever copied from the base to the overlay, and
 * as no bit is ever cleared, threads share the map without a lock. It costs 32 KiB for each GiB of
 * the disk, and of these only pages that are touched. */
#ifndef PYVMM_BLK_SNAPSHOT_H
#define PYVMM_BLK_SNAPSHOT_H

#include "blk_io.h"

struct blk_snapshot {
    struct blk_image *base; /* never written */
    struct blk_image overlay;
    uint64_t *map;
    uint64_t map_bytes;
};

/* A snapshot of `base`, which outlives it, with writes in the empty file `overlay_fd`, which stays
 * the caller's; both for disks of up to `size` bytes. NULL with errno set on failure. */
struct blk_snapshot *blk_snapshot_create(struct blk_image *base, int overlay_fd, uint64_t size);
void blk_snapshot_destroy(struct blk_snapshot *snapshot);

/* Makes the disk larger: what is beyond the base reads as zeroes. No request may be in flight. 0 or
 * -errno. */
int blk_snapshot_grow(struct blk_snapshot *snapshot, uint64_t size);

/* Where the bytes at `offset` lie; `length` is cut to as many as lie there together. */
struct blk_image *blk_snapshot_locate(struct blk_snapshot *snapshot, uint64_t offset,
                                      uint64_t *length);

/* The bytes up to `end` were written to the overlay, from `offset` on or before it within the same
 * sector. What happens to a sector that is not covered to its end is as if it had not. */
void blk_snapshot_mark(struct blk_snapshot *snapshot, uint64_t offset, uint64_t end);

#endif
