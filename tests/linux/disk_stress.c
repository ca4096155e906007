/*
 * Writes, reads and verifies disks from several processes at once, each in a region of its own:
 *
 *     disk_stress SECONDS WORKERS DEVICE...
 *
 * Every sector holds a pattern made from its number and its generation, and the worker knows which
 * generation was written last. All workers but the last of each device use O_DIRECT, so that each
 * request waits for its interrupt. Exit status: 0 all is well, 1 wrong data or a failed request,
 * 2 a request that was never answered.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512
#define WORDS (SECTOR / sizeof(uint64_t))
#define MOST_SECTORS 128
#define MOST_WORKERS 256
#define REGION_ALIGN (1 << 20)
#define STUCK_SECONDS 90
#define UNKNOWN UINT32_MAX /* what a discard leaves is the device's choice */

static volatile uint64_t *progress; /* requests done, by worker */

struct region {
    const char *device;
    uint64_t start, sectors;
    int fd;
    bool direct;
    uint64_t random;
    uint32_t generation;
    uint32_t *written; /* generation of each sector, 0: never, all zero */
    uint64_t *buffer;
};

static uint64_t next_random(struct region *region)
{
    uint64_t x = region->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return region->random = x;
}

static uint64_t pattern(uint64_t sector, uint32_t generation, unsigned word)
{
    if (!generation)
        return 0;
    return (sector << 40 ^ (uint64_t)generation << 8 ^ word) * 0x9e3779b97f4a7c15ull;
}

static void fail(const struct region *region, const char *what, uint64_t sector)
{
    fprintf(stderr, "%s: %s at sector %llu%s%s\n", region->device, what,
            (unsigned long long)(region->start + sector), errno ? ": " : "",
            errno ? strerror(errno) : "");
    exit(1);
}

static void write_sectors(struct region *region, uint64_t sector, unsigned count)
{
    uint32_t generation = ++region->generation;
    for (unsigned i = 0; i < count; i++) {
        for (unsigned word = 0; word < WORDS; word++)
            region->buffer[i * WORDS + word] =
                pattern(region->start + sector + i, generation, word);
        region->written[sector + i] = generation;
    }
    ssize_t size = (ssize_t)count * SECTOR;
    if (pwrite(region->fd, region->buffer, size, (region->start + sector) * SECTOR) != size)
        fail(region, "a write failed", sector);
}

static void verify_sectors(struct region *region, uint64_t sector, unsigned count)
{
    ssize_t size = (ssize_t)count * SECTOR;
    if (pread(region->fd, region->buffer, size, (region->start + sector) * SECTOR) != size)
        fail(region, "a read failed", sector);
    for (unsigned i = 0; i < count; i++) {
        uint32_t generation = region->written[sector + i];
        if (generation == UNKNOWN)
            continue;
        for (unsigned word = 0; word < WORDS; word++) {
            errno = 0;
            if (region->buffer[i * WORDS + word] !=
                pattern(region->start + sector + i, generation, word))
                fail(region, "wrong data", sector + i);
        }
    }
}

static void clear_sectors(struct region *region, unsigned long request, uint64_t sector,
                          unsigned count)
{
    uint64_t range[2] = {(region->start + sector) * SECTOR, (uint64_t)count * SECTOR};
    if (ioctl(region->fd, request, range))
        fail(region, request == BLKDISCARD ? "a discard failed" : "zeroing failed", sector);
    for (unsigned i = 0; i < count; i++)
        region->written[sector + i] = request == BLKDISCARD ? UNKNOWN : 0;
}

static void one_request(struct region *region)
{
    unsigned count = 1 + next_random(region) % MOST_SECTORS;
    uint64_t sector = next_random(region) % (region->sectors - count);

    switch (next_random(region) % 16) {
    case 0:
        if (fdatasync(region->fd))
            fail(region, "a flush failed", sector);
        break;
    case 1:
        clear_sectors(region, BLKDISCARD, sector, count);
        break;
    case 2:
        clear_sectors(region, BLKZEROOUT, sector, count);
        break;
    case 3 ... 8:
        write_sectors(region, sector, count);
        break;
    default:
        verify_sectors(region, sector, count);
    }
}

static void work(struct region *region, unsigned worker, time_t end)
{
    region->fd = open(region->device, O_RDWR | (region->direct ? O_DIRECT : 0));
    if (region->fd < 0)
        fail(region, "cannot be opened", 0);
    region->random = 0x853c49e6748fea9bull * (worker + 1);
    region->written = calloc(region->sectors, sizeof(uint32_t));
    region->buffer = aligned_alloc(4096, MOST_SECTORS * SECTOR);
    while (time(NULL) < end) {
        one_request(region);
        progress[worker]++;
    }
    for (uint64_t sector = 0; sector < region->sectors; sector += MOST_SECTORS) {
        uint64_t left = region->sectors - sector;
        verify_sectors(region, sector, left < MOST_SECTORS ? left : MOST_SECTORS);
        progress[worker]++;
    }
    if (fdatasync(region->fd))
        fail(region, "the last flush failed", 0);
    exit(0);
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: disk_stress SECONDS WORKERS DEVICE...\n");
        return 1;
    }
    time_t end = time(NULL) + atoi(argv[1]);
    unsigned each = atoi(argv[2]), workers = 0;
    struct region regions[MOST_WORKERS];
    pid_t pids[MOST_WORKERS];

    progress = mmap(NULL, MOST_WORKERS * sizeof(*progress), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (char **device = argv + 3; *device; device++) {
        uint64_t size;
        int fd = open(*device, O_RDWR);
        if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size)) {
            perror(*device);
            return 1;
        }
        close(fd);
        uint64_t share = size / each / REGION_ALIGN * REGION_ALIGN;
        for (unsigned i = 0; i < each && workers < MOST_WORKERS; i++) {
            regions[workers++] = (struct region){
                .device = *device,
                .start = i * share / SECTOR,
                .sectors = share / SECTOR,
                .direct = i + 1 < each,
            };
        }
    }
    for (unsigned i = 0; i < workers; i++) {
        pids[i] = fork();
        if (!pids[i])
            work(&regions[i], i, end);
    }

    uint64_t seen[MOST_WORKERS] = {0}, total = 0;
    time_t moved[MOST_WORKERS];
    for (unsigned i = 0; i < workers; i++)
        moved[i] = time(NULL);
    unsigned running = workers;
    int result = 0;
    while (running) {
        sleep(1);
        for (unsigned i = 0; i < workers; i++) {
            int status;
            if (pids[i] && waitpid(pids[i], &status, WNOHANG) == pids[i]) {
                pids[i] = 0;
                running--;
                total += progress[i];
                if (status)
                    result = 1;
            } else if (pids[i] && progress[i] != seen[i]) {
                seen[i] = progress[i];
                moved[i] = time(NULL);
            } else if (pids[i] && time(NULL) - moved[i] > STUCK_SECONDS) {
                fprintf(stderr, "%s: worker %u waits for request %llu since %d s\n",
                        regions[i].device, i, (unsigned long long)seen[i] + 1, STUCK_SECONDS);
                return 2;
            }
        }
    }
    printf("%llu requests by %u workers\n", (unsigned long long)total, workers);
    return result;
}
