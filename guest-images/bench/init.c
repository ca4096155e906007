/*
 * The guest of scripts/bench, a static /init. Without the argument "serve" (kernel parameters
 * "-- serve") it powers off at once. With it, it obeys lines on its console:
 *
 *   read PATTERN SIZE DEPTH MS   reads /dev/vda with O_DIRECT, DEPTH reads of SIZE bytes at a time,
 *                                "random" or "sequential", for MS milliseconds, and prints
 *                                "start" and then "done READS MICROSECONDS"
 *   off                          powers off
 *
 * and prints "ready" when it awaits one. What goes wrong is printed as "error: ...", and powers off.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 256

static void power_off(void)
{
    reboot(RB_POWER_OFF);
    _exit(1); /* a panic: it cannot be taken for a power-off */
}

static void fail(const char *what)
{
    printf("error: %s: %s\n", what, strerror(errno));
    power_off();
}

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

struct reader {
    int fd;
    int random;
    uint64_t size;   /* of a read */
    uint64_t blocks; /* of that size on the disk */
    uint64_t next;
    uint64_t seed;
};

/* xorshift64: the same blocks in each run. */
static uint64_t next_block(struct reader *reader)
{
    if (!reader->random)
        return reader->next++ % reader->blocks;
    reader->seed ^= reader->seed << 13;
    reader->seed ^= reader->seed >> 7;
    reader->seed ^= reader->seed << 17;
    return reader->seed % reader->blocks;
}

static void submit(aio_context_t context, struct reader *reader, struct iocb **batch, long count)
{
    for (long index = 0; index < count; index++)
        batch[index]->aio_offset = (int64_t)(next_block(reader) * reader->size);
    for (long done = 0; done < count;) {
        long accepted = syscall(SYS_io_submit, context, count - done, batch + done);

        if (accepted <= 0)
            fail("io_submit");
        done += accepted;
    }
}

static void measure(struct reader *reader, unsigned depth, uint64_t duration_us)
{
    static struct iocb blocks[MAX_DEPTH];
    struct iocb *batch[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    aio_context_t context = 0;
    uint64_t reads = 0, start, elapsed;
    char *buffers;

    if (syscall(SYS_io_setup, depth, &context))
        fail("io_setup");
    buffers = mmap(NULL, depth * reader->size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (buffers == MAP_FAILED)
        fail("memory for the reads");
    for (unsigned index = 0; index < depth; index++) {
        blocks[index] = (struct iocb){
            .aio_lio_opcode = IOCB_CMD_PREAD,
            .aio_fildes = (uint32_t)reader->fd,
            .aio_buf = (uintptr_t)(buffers + index * reader->size),
            .aio_nbytes = reader->size,
        };
        batch[index] = &blocks[index];
    }
    printf("start\n");
    start = now_us();
    submit(context, reader, batch, depth);
    do {
        long count = syscall(SYS_io_getevents, context, 1, depth, events, NULL);

        if (count <= 0)
            fail("io_getevents");
        for (long index = 0; index < count; index++) {
            if (events[index].res != (int64_t)reader->size) {
                errno = events[index].res < 0 ? (int)-events[index].res : EIO;
                fail("read of /dev/vda");
            }
            batch[index] = (struct iocb *)(uintptr_t)events[index].obj;
        }
        reads += (uint64_t)count;
        elapsed = now_us() - start;
        if (elapsed < duration_us)
            submit(context, reader, batch, count);
    } while (elapsed < duration_us);
    printf("done %llu %llu\n", (unsigned long long)reads, (unsigned long long)elapsed);
    /* Waits for the reads that are still on their way. */
    syscall(SYS_io_destroy, context);
    munmap(buffers, depth * reader->size);
}

static void serve(void)
{
    struct reader reader = {.seed = 88172645463325252u};
    char line[128], pattern[16];
    unsigned long long duration_ms;
    uint64_t disk_size;
    unsigned depth;

    mkdir("/dev", 0755);
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) && errno != EBUSY)
        fail("mount of /dev");
    reader.fd = open("/dev/vda", O_RDONLY | O_DIRECT);
    if (reader.fd < 0 || ioctl(reader.fd, BLKGETSIZE64, &disk_size))
        fail("/dev/vda");
    printf("ready\n");
    while (fgets(line, sizeof(line), stdin)) {
        if (!strcmp(line, "off\n"))
            return;
        if (sscanf(line, "read %15s %llu %u %llu", pattern, (unsigned long long *)&reader.size,
                   &depth, &duration_ms) != 4 ||
            !reader.size || reader.size > disk_size || !depth || depth > MAX_DEPTH) {
            errno = EINVAL;
            fail("command");
        }
        reader.random = !strcmp(pattern, "random");
        reader.blocks = disk_size / reader.size;
        reader.next = 0;
        measure(&reader, depth, duration_ms * 1000);
        printf("ready\n");
    }
    fail("console");
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && !strcmp(argv[1], "serve"))
        serve();
    power_off();
}
