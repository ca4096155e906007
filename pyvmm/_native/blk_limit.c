#include "blk_limit.h"

#include "blk_io.h"

#define SECOND_NS 1000000000ull
/* Debts are bounded, so that no sum overflows: an hour. */
#define MAX_COST_NS (3600 * SECOND_NS)

void blk_limit_set(struct blk_image *image, uint64_t iops, uint64_t bps)
{
    struct blk_limit *limit = &image->limit;

    __atomic_store_n(&limit->iops, iops, __ATOMIC_RELAXED);
    __atomic_store_n(&limit->bps, bps, __ATOMIC_RELAXED);
    __atomic_store_n(&limit->requests_paid_at, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&limit->bytes_paid_at, 0, __ATOMIC_RELAXED);
    /* Who sees the new generation sees the new rates (blk_io.c, claim). */
    __atomic_fetch_add(&limit->generation, 1, __ATOMIC_RELEASE);
}

static uint64_t reserve(uint64_t *paid_at, uint64_t rate, uint64_t now, uint64_t units)
{
    uint64_t old = __atomic_load_n(paid_at, __ATOMIC_RELAXED);
    uint64_t from, cost;

    if (rate == 0)
        return 0;
    cost = (uint64_t)((double)units * SECOND_NS / (double)rate);
    if (cost > MAX_COST_NS)
        cost = MAX_COST_NS;
    do {
        from = old;
        if (now > BLK_LIMIT_BURST_NS && from < now - BLK_LIMIT_BURST_NS)
            from = now - BLK_LIMIT_BURST_NS; /* a full bucket takes no more */
    } while (!__atomic_compare_exchange_n(paid_at, &old, from + cost, false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return from;
}

uint64_t blk_limit_reserve(struct blk_limit *limit, uint64_t now, uint64_t bytes)
{
    uint64_t iops = __atomic_load_n(&limit->iops, __ATOMIC_RELAXED);
    uint64_t bps = __atomic_load_n(&limit->bps, __ATOMIC_RELAXED);
    uint64_t requests = reserve(&limit->requests_paid_at, iops, now, 1);
    uint64_t transfer = reserve(&limit->bytes_paid_at, bps, now, bytes);

    return requests > transfer ? requests : transfer;
}
