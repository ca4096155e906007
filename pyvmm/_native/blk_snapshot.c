#include "blk_snapshot.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SECTOR 512u
#define WORD 64u

static uint64_t map_bytes(uint64_t size)
{
    return (size / SECTOR + WORD) / WORD * sizeof(uint64_t);
}

struct blk_snapshot *blk_snapshot_create(struct blk_image *base, int overlay_fd, uint64_t size)
{
    struct blk_snapshot *snapshot = calloc(1, sizeof(*snapshot));

    if (!snapshot)
        return NULL;
    snapshot->map_bytes = map_bytes(size);
    snapshot->map = mmap(NULL, snapshot->map_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (snapshot->map == MAP_FAILED) {
        free(snapshot);
        return NULL;
    }
    snapshot->base = base;
    snapshot->overlay = (struct blk_image){
        .fd = overlay_fd,
        .size = size,
        .block_size = SECTOR,
        .buffer_align = 1,
        .in_memory = blk_image_in_memory(overlay_fd),
    };
    return snapshot;
}

void blk_snapshot_destroy(struct blk_snapshot *snapshot)
{
    if (!snapshot)
        return;
    munmap(snapshot->map, snapshot->map_bytes);
    free(snapshot);
}

/* Pairs with the release in blk_snapshot_mark: who sees the bit sees what was written. */
static uint64_t load(const struct blk_snapshot *snapshot, uint64_t sector)
{
    return __atomic_load_n(&snapshot->map[sector / WORD], __ATOMIC_ACQUIRE);
}

struct blk_image *blk_snapshot_locate(struct blk_snapshot *snapshot, uint64_t offset,
                                      uint64_t *length)
{
    uint64_t sector = offset / SECTOR;
    uint64_t end = (offset + *length + SECTOR - 1) / SECTOR;
    uint64_t word = load(snapshot, sector);
    bool in_overlay = word >> sector % WORD & 1;

    while (sector < end) {
        uint64_t others = (in_overlay ? ~word : word) >> sector % WORD;

        if (others) {
            sector += (uint64_t)__builtin_ctzll(others);
            break;
        }
        sector += WORD - sector % WORD;
        if (sector < end)
            word = load(snapshot, sector);
    }
    if (sector < end)
        *length = sector * SECTOR - offset;
    return in_overlay ? &snapshot->overlay : snapshot->base;
}

void blk_snapshot_mark(struct blk_snapshot *snapshot, uint64_t offset, uint64_t end)
{
    uint64_t sector = offset / SECTOR;
    uint64_t end_sector = end / SECTOR;

    while (sector < end_sector) {
        uint64_t next = sector - sector % WORD + WORD;
        uint64_t bits = ~0ull << sector % WORD;

        if (next > end_sector) {
            next = end_sector;
            bits &= ~0ull >> (WORD - end_sector % WORD);
        }
        if (bits & ~load(snapshot, sector)) /* mostly they are set: no reason to own the line */
            __atomic_fetch_or(&snapshot->map[sector / WORD], bits, __ATOMIC_RELEASE);
        sector = next;
    }
}

int blk_snapshot_grow(struct blk_snapshot *snapshot, uint64_t size)
{
    uint64_t before = snapshot->overlay.size;
    uint64_t *map = mremap(snapshot->map, snapshot->map_bytes, map_bytes(size), MREMAP_MAYMOVE);

    if (map == MAP_FAILED)
        return -errno;
    snapshot->map = map;
    snapshot->map_bytes = map_bytes(size);
    snapshot->overlay.size = size;
    blk_snapshot_mark(snapshot, before, size);
    return 0;
}
