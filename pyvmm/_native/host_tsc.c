#include "host_tsc.h"

#include <time.h>
#include <x86intrin.h>

#define INTERVAL_NS 20000000u
#define ATTEMPTS 16

/* The counter and the clock at one moment. */
struct reading {
    uint64_t tsc;
    uint64_t ns;
};

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The attempt that was interrupted least: its two reads of the counter are the closest. */
static struct reading take_reading(void)
{
    struct reading best = {0};
    uint64_t least = UINT64_MAX;

    for (int i = 0; i < ATTEMPTS; i++) {
        uint64_t before = __rdtsc();
        uint64_t ns = now_ns();
        uint64_t after = __rdtsc();

        if (after - before < least) {
            least = after - before;
            best = (struct reading){before + (after - before) / 2, ns};
        }
    }
    return best;
}

uint32_t host_tsc_khz(void)
{
    struct reading start = take_reading(), end;
    struct timespec interval = {.tv_nsec = INTERVAL_NS};

    nanosleep(&interval, NULL);
    end = take_reading();
    return (uint32_t)((end.tsc - start.tsc) * 1000000u / (end.ns - start.ns));
}
