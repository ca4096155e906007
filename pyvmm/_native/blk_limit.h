/* How fast requests may go: a token bucket for requests and one for bytes, for each image.
 *
 * A bucket holds what its rate gives in BLK_LIMIT_BURST_NS. A request that finds one in debt is told
 * when it may start, and its own cost is added to the debt at once: so requests of all threads go in
 * the order they came, without a lock. */
#ifndef PYVMM_BLK_LIMIT_H
#define PYVMM_BLK_LIMIT_H

#include <stdint.h>

#define BLK_LIMIT_BURST_NS 100000000u

/* All zero: no limit. */
struct blk_limit {
    uint64_t iops; /* requests a second; 0: any number */
    uint64_t bps;  /* bytes a second */
    uint64_t requests_paid_at; /* when the debt of the bucket is paid, CLOCK_MONOTONIC in ns */
    uint64_t bytes_paid_at;
    uint32_t generation; /* of the two rates */
};

struct blk_image;

/* Other rates from now on, also for what waits already. Any thread, one at a time. Who waits for
 * the old ones in blk_io_wait has to be woken up. */
void blk_limit_set(struct blk_image *image, uint64_t iops, uint64_t bps);

/* When a request of `bytes` that comes at `now` may start. Any thread. */
uint64_t blk_limit_reserve(struct blk_limit *limit, uint64_t now, uint64_t bytes);

#endif
