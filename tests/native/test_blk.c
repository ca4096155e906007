/* The block engine and the block device's queues, under sanitizers and with assertions on: what
 * needs simulated results, real concurrency or a look at memory. The rest is tests/unit/test_blk.py. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blk_io.h"
#include "blk_remote.h"
#include "blk_snapshot.h"
#include "blk_step.h"
#include "check.h"
#include "virtio_blk.h"
#include "worker.h"

/* --- steps, with results that a kernel seldom gives ---------------------------------------- */

static int outcome;
static unsigned done_count;

static void record_done(struct blk_request *request, int error)
{
    (void)request;
    outcome = error;
    done_count++;
}

static const struct blk_image cached = {.size = 1 << 20, .block_size = 512, .buffer_align = 1};
static const struct blk_image direct = {.size = 1 << 20, .block_size = 512, .buffer_align = 512};
static const struct blk_image device = {
    .size = 1 << 20, .block_size = 512, .buffer_align = 1, .is_block_device = true};

/* A request and the step it is at. */
struct script {
    struct blk_image image;
    struct blk_request request;
    struct blk_step step;
    int error;
};

static enum blk_next first(struct script *script)
{
    script->request.image = &script->image;
    return blk_step_first(&script->request, &script->step, &script->error);
}

static enum blk_next next(struct script *script, int64_t result)
{
    return blk_step_next(&script->request, result, &script->step, &script->error);
}

static void test_short_transfers_go_on(void)
{
    uint8_t data[4][1024];
    struct iovec iov[4];
    struct script script = {.image = cached};

    for (int op = BLK_READ; op <= BLK_WRITE; op++) {
        for (int i = 0; i < 4; i++)
            iov[i] = (struct iovec){data[i], sizeof(data[i])};
        script.request = (struct blk_request){
            .op = op, .stable = op == BLK_WRITE, .offset = 8192, .iov = iov, .iov_count = 4};
        CHECK(first(&script) == BLK_STEP);
        CHECK(script.step.kind == (op == BLK_READ ? BLK_STEP_READ : BLK_STEP_WRITE));
        CHECK(script.step.stable == (op == BLK_WRITE));
        CHECK(script.step.offset == 8192 && script.step.iov_count == 4);
        CHECK(next(&script, 1500) == BLK_STEP);
        CHECK(script.step.offset == 8192 + 1500 && script.step.iov_count == 3);
        CHECK(script.step.iov[0].iov_base == data[1] + 476);
        CHECK(script.step.iov[0].iov_len == 1024 - 476);
        CHECK(next(&script, -EINTR) == BLK_STEP);
        CHECK(script.step.offset == 8192 + 1500 && script.step.iov_count == 3);
        CHECK(next(&script, 4096 - 1500 - 1) == BLK_STEP);
        CHECK(script.step.iov_count == 1 && script.step.iov[0].iov_len == 1);
        CHECK(next(&script, 1) == BLK_DONE && script.error == 0);
    }
}

static void test_ends_and_errors_of_transfers(void)
{
    uint8_t data[1024];
    struct iovec iov;
    struct script script = {.image = cached};

    for (int op = BLK_READ; op <= BLK_WRITE; op++) {
        iov = (struct iovec){data, sizeof(data)};
        script.request = (struct blk_request){.op = op, .iov = &iov, .iov_count = 1};
        CHECK(first(&script) == BLK_STEP);
        CHECK(next(&script, 512) == BLK_STEP);
        CHECK(next(&script, 0) == BLK_DONE && script.error == -EIO);

        iov = (struct iovec){data, sizeof(data)};
        script.request = (struct blk_request){.op = op, .iov = &iov, .iov_count = 1};
        CHECK(first(&script) == BLK_STEP);
        CHECK(next(&script, -ENOSPC) == BLK_DONE && script.error == -ENOSPC);

        script.request = (struct blk_request){.op = op, .iov = &iov, .iov_count = 0};
        CHECK(first(&script) == BLK_DONE && script.error == 0);
    }
}

static void test_more_buffers_than_one_call_takes(void)
{
    static uint8_t data[512];
    static struct iovec iov[IOV_MAX + 10];
    struct script script = {.image = cached};

    for (int i = 0; i < IOV_MAX + 10; i++)
        iov[i] = (struct iovec){data, sizeof(data)};
    script.request = (struct blk_request){.op = BLK_WRITE, .iov = iov, .iov_count = IOV_MAX + 10};
    CHECK(first(&script) == BLK_STEP);
    CHECK(script.step.iov_count == IOV_MAX);
    CHECK(next(&script, IOV_MAX * 512) == BLK_STEP);
    CHECK(script.step.iov_count == 10 && script.step.offset == IOV_MAX * 512);
    CHECK(next(&script, 10 * 512) == BLK_DONE && script.error == 0);
}

/* Plays the kernel with an image in memory, which takes `most` bytes at a time. */
static void play(struct script *script, uint8_t *contents, size_t most)
{
    enum blk_next what = first(script);

    while (what == BLK_STEP) {
        size_t moved = 0;

        CHECK(script->step.iov_count == 1);
        CHECK((uintptr_t)script->step.iov->iov_base % 512 == 0);
        CHECK(script->step.iov->iov_len % 512 == 0);
        moved = script->step.iov->iov_len < most ? script->step.iov->iov_len : most;
        if (script->step.kind == BLK_STEP_READ)
            memcpy(script->step.iov->iov_base, contents + script->step.offset, moved);
        else
            memcpy(contents + script->step.offset, script->step.iov->iov_base, moved);
        what = next(script, (int64_t)moved);
    }
    CHECK(script->error == 0);
}

static void test_misaligned_buffers_are_bounced(void)
{
    enum { SIZE = 640 << 10 };
    uint8_t *contents = malloc(SIZE), *data = malloc(SIZE + 1), *copy = malloc(SIZE + 1);
    const size_t cuts[] = {1, 511, 300 << 10, 7, 64 << 10};
    const size_t mosts[] = {512, 4096, SIZE};

    for (int round = 0; round < 3; round++) {
        struct script script = {.image = direct};

        for (int op = BLK_WRITE; op >= BLK_READ; op--) {
            uint8_t *buffer = op == BLK_WRITE ? data : copy;
            struct iovec iov[6];
            size_t at = 0;

            for (size_t i = 0; i < 5; i++) {
                iov[i] = (struct iovec){buffer + 1 + at, cuts[i]};
                at += cuts[i];
            }
            iov[5] = (struct iovec){buffer + 1 + at, SIZE - at};
            if (op == BLK_WRITE)
                for (int i = 0; i <= SIZE; i++)
                    data[i] = (uint8_t)rand();
            script.request = (struct blk_request){.op = op, .iov = iov, .iov_count = 6};
            play(&script, contents, mosts[round]);
        }
        CHECK(memcmp(contents, data + 1, SIZE) == 0);
        CHECK(memcmp(copy + 1, data + 1, SIZE) == 0);
    }
    free(contents);
    free(data);
    free(copy);
}

static void test_a_failed_bounce_frees_its_buffer(void)
{
    uint8_t data[1024];
    struct iovec iov = {data + 1, 512};
    struct script script = {
        .image = direct,
        .request = {.op = BLK_READ, .iov = &iov, .iov_count = 1},
    };

    CHECK(first(&script) == BLK_STEP);
    CHECK(script.step.iov->iov_base != data + 1);
    CHECK(next(&script, -EIO) == BLK_DONE && script.error == -EIO); /* LeakSanitizer looks */
}

static void test_discard_tries_each_way_once(void)
{
    const struct blk_range range = {4096, 8192};
    struct script script = {.image = device};

    script.request = (struct blk_request){.op = BLK_DISCARD, .ranges = &range, .range_count = 1};
    CHECK(first(&script) == BLK_STEP && script.step.kind == BLK_STEP_DISCARD);
    CHECK(script.step.offset == 4096 && script.step.length == 8192);
    CHECK(next(&script, -EOPNOTSUPP) == BLK_STEP && script.step.kind == BLK_STEP_ALLOCATE);
    CHECK(script.step.mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
    CHECK(next(&script, -EOPNOTSUPP) == BLK_DONE && script.error == -EOPNOTSUPP);

    script.request = (struct blk_request){.op = BLK_DISCARD, .ranges = &range, .range_count = 1};
    CHECK(first(&script) == BLK_DONE && script.error == -EOPNOTSUPP);
}

static void test_zeroes_are_written_at_last(void)
{
    const struct blk_range ranges[] = {{512, 3 << 20}, {0, 0}, {8 << 20, 512}};
    struct script script = {.image = cached};
    uint64_t written = 0;

    script.request = (struct blk_request){
        .op = BLK_WRITE_ZEROES, .may_unmap = true, .stable = true,
        .ranges = ranges, .range_count = 3};
    CHECK(first(&script) == BLK_STEP && script.step.kind == BLK_STEP_ALLOCATE);
    CHECK(script.step.mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
    CHECK(next(&script, -EOPNOTSUPP) == BLK_STEP && script.step.kind == BLK_STEP_ALLOCATE);
    CHECK(script.step.mode == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE));
    CHECK(next(&script, -EOPNOTSUPP) == BLK_STEP);
    while (script.step.offset < 8 << 20) {
        CHECK(script.step.kind == BLK_STEP_WRITE && script.step.stable);
        CHECK(script.step.offset == 512 + written && script.step.iov_count == 1);
        for (size_t i = 0; i < script.step.iov->iov_len; i++)
            CHECK(((uint8_t *)script.step.iov->iov_base)[i] == 0);
        written += 700 << 10;
        if (written > 3 << 20)
            written = 3 << 20;
        CHECK(next(&script, (int64_t)(512 + written - script.step.offset)) == BLK_STEP);
    }
    CHECK(script.step.offset == 8 << 20 && script.step.iov->iov_len == 512);
    CHECK(next(&script, 512) == BLK_STEP && script.step.kind == BLK_STEP_SYNC);
    CHECK(next(&script, 0) == BLK_DONE && script.error == 0);
}

/* After an error the request is what is left to do. */
static void test_a_failed_request_can_be_submitted_again(void)
{
    static uint8_t data[4096];
    const struct blk_range ranges[] = {{0, 512}, {1024, 512}, {4096, 512}};
    struct iovec iov[] = {{data, 1000}, {data + 1000, 3096}};
    struct script script = {
        .image = cached,
        .request = {.op = BLK_WRITE, .offset = 8192, .iov = iov, .iov_count = 2},
    };

    CHECK(first(&script) == BLK_STEP);
    CHECK(next(&script, 1536) == BLK_STEP);
    CHECK(next(&script, -ENOSPC) == BLK_DONE && script.error == -ENOSPC);
    CHECK(first(&script) == BLK_STEP && script.step.offset == 8192 + 1536);
    CHECK(script.step.iov_count == 1 && script.step.iov->iov_base == data + 1536);
    CHECK(script.step.iov->iov_len == 4096 - 1536);
    CHECK(next(&script, 4096 - 1536) == BLK_DONE && script.error == 0);

    script.request = (struct blk_request){.op = BLK_WRITE_ZEROES, .ranges = ranges, .range_count = 3};
    CHECK(first(&script) == BLK_STEP && next(&script, 0) == BLK_STEP);
    CHECK(script.step.offset == 1024);
    CHECK(next(&script, -EIO) == BLK_DONE && script.error == -EIO);
    CHECK(first(&script) == BLK_STEP && script.step.offset == 1024);
    CHECK(next(&script, 0) == BLK_STEP && script.step.offset == 4096);
    CHECK(next(&script, 0) == BLK_DONE && script.error == 0);

    /* A write that is stable by a flush fails in the flush. */
    script.image.no_fua = true;
    iov[0] = (struct iovec){data, 512};
    script.request = (struct blk_request){
        .op = BLK_WRITE, .stable = true, .iov = iov, .iov_count = 1};
    CHECK(first(&script) == BLK_STEP && next(&script, 512) == BLK_STEP);
    CHECK(script.step.kind == BLK_STEP_SYNC);
    CHECK(next(&script, -EIO) == BLK_DONE && script.error == -EIO);
    CHECK(first(&script) == BLK_STEP && script.step.kind == BLK_STEP_SYNC);
    CHECK(next(&script, 0) == BLK_DONE && script.error == 0);
}

/* A request whose sectors lie in turns below and above takes a step for each run of them, and leaves
 * its buffers as they were cut. */
static void test_runs_of_a_snapshot(void)
{
    enum { SECTORS = 200 };
    static uint8_t data[SECTORS * 512];
    struct blk_image base = cached;
    struct blk_snapshot *snapshot = blk_snapshot_create(&base, -1, cached.size);
    struct script script = {.image = cached};
    struct iovec iov[] = {{data, 1000}, {data + 1000, 24}, {data + 1024, sizeof(data) - 1024}};
    const uint64_t cuts[] = {0, 1, 3, 63, 64, 65, 128, 192, SECTORS}; /* runs begin in the overlay */

    CHECK(snapshot);
    script.image.snapshot = snapshot;
    for (int i = 0; i + 1 < 9; i += 2)
        blk_snapshot_mark(snapshot, 512 * (64 + cuts[i]), 512 * (64 + cuts[i + 1]));
    script.request = (struct blk_request){.op = BLK_READ, .offset = 64 * 512, .iov = iov, .iov_count = 3};
    CHECK(first(&script) == BLK_STEP);
    for (int i = 0; i < 8; i++) {
        uint64_t size = 0, expected = 512 * (cuts[i + 1] - cuts[i]);

        CHECK(script.step.image == (i % 2 ? &base : &snapshot->overlay));
        CHECK(script.step.offset == 512 * (64 + cuts[i]));
        for (uint32_t j = 0; j < script.step.iov_count; j++)
            size += script.step.iov[j].iov_len;
        CHECK(size == expected);
        if (expected > 512) /* a short read goes on in the same run */
            CHECK(next(&script, 100) == BLK_STEP && script.step.image == (i % 2 ? &base : &snapshot->overlay));
        CHECK(next(&script, (int64_t)(expected > 512 ? expected - 100 : expected)) ==
              (i == 7 ? BLK_DONE : BLK_STEP));
    }
    CHECK(script.error == 0);
    blk_snapshot_destroy(snapshot);
}

static void test_marks_cover_whole_sectors(void)
{
    struct blk_image base = cached;
    struct blk_snapshot *snapshot = blk_snapshot_create(&base, -1, cached.size);
    uint64_t length = 4096;

    CHECK(snapshot);
    blk_snapshot_mark(snapshot, 512, 1000); /* a write that ended early */
    CHECK(blk_snapshot_locate(snapshot, 512, &length) == &base && length == 4096);
    blk_snapshot_mark(snapshot, 1000, 1024); /* and went on */
    CHECK(blk_snapshot_locate(snapshot, 512, &length) == &snapshot->overlay && length == 512);
    length = 4096;
    CHECK(blk_snapshot_locate(snapshot, 0, &length) == &base && length == 512);
    length = cached.size - 1024;
    CHECK(blk_snapshot_locate(snapshot, 1024, &length) == &base && length == cached.size - 1024);
    blk_snapshot_mark(snapshot, 0, cached.size);
    length = cached.size;
    CHECK(blk_snapshot_locate(snapshot, 0, &length) == &snapshot->overlay && length == cached.size);
    blk_snapshot_destroy(snapshot);
}

static void test_an_error_ends_the_ranges(void)
{
    const struct blk_range ranges[] = {{0, 512}, {512, 512}};
    struct script script = {
        .image = cached,
        .request = {.op = BLK_WRITE_ZEROES, .ranges = ranges, .range_count = 2},
    };

    CHECK(first(&script) == BLK_STEP && script.step.mode & FALLOC_FL_ZERO_RANGE);
    CHECK(next(&script, -EIO) == BLK_DONE && script.error == -EIO);
}

/* --- the engines ---------------------------------------------------------------------------- */

static int temporary_file(size_t size)
{
    char name[] = "/tmp/pyvmm-blk-XXXXXX";
    int fd = mkstemp(name);

    CHECK(fd >= 0);
    unlink(name);
    CHECK(ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static void test_a_watched_eventfd_ends_the_wait(enum blk_engine engine)
{
    struct blk_io *io = blk_io_create(engine, 4);
    int eventfds[BLK_IO_MAX_WATCHES];

    CHECK(io);
    for (int i = 0; i < BLK_IO_MAX_WATCHES; i++) {
        eventfds[i] = eventfd(i == 0, EFD_NONBLOCK); /* the first has a count already */
        CHECK(blk_io_watch(io, eventfds[i]) == 0);
    }
    CHECK(blk_io_watch(io, eventfds[0]) == -ENOSPC);
    CHECK(blk_io_wait(io, true) == 0);
    for (int i = 0; i < 1000; i++) { /* each signal wakes, though nobody reads */
        eventfd_signal(eventfds[i % BLK_IO_MAX_WATCHES]);
        CHECK(blk_io_wait(io, true) == 0);
    }
    CHECK(blk_io_wait(io, false) == 0);
    blk_io_destroy(io);
    for (int i = 0; i < BLK_IO_MAX_WATCHES; i++)
        close(eventfds[i]);
}

/* Requests on several images, one of which lies in memory, through one engine. */
static void test_every_request_is_done_once(enum blk_engine engine)
{
    enum { DEPTH = 64, IMAGES = 3 };
    struct blk_image images[IMAGES];
    struct blk_io *io = blk_io_create(engine, DEPTH);
    static uint8_t data[DEPTH][4096];
    static struct iovec iov[DEPTH];
    static struct blk_request requests[DEPTH];

    CHECK(io);
    for (int i = 0; i < IMAGES; i++)
        images[i] = (struct blk_image){
            .fd = temporary_file(1 << 20), .size = 1 << 20, .block_size = 512, .in_memory = i == 1};
    for (int round = 0; round < 20; round++) {
        done_count = 0;
        for (int i = 0; i < DEPTH; i++) {
            memset(data[i], round * DEPTH + i, sizeof(data[i]));
            iov[i] = (struct iovec){data[i], sizeof(data[i])};
            requests[i] = (struct blk_request){
                .image = &images[i % IMAGES],
                .op = i % 8 == 7 ? BLK_FLUSH : BLK_WRITE,
                .stable = i % 16 == 0,
                .offset = (uint64_t)i * 4096,
                .iov = &iov[i],
                .iov_count = 1,
                .done = record_done,
            };
            blk_io_submit(io, &requests[i]);
        }
        while (blk_io_in_flight(io) > 0)
            CHECK(blk_io_wait(io, true) == 0 && outcome == 0);
        CHECK(done_count == DEPTH);
    }
    blk_io_destroy(io);
    for (int i = 0; i < DEPTH; i++) {
        uint8_t check[4096];

        CHECK(pread(images[i % IMAGES].fd, check, sizeof(check), (off_t)i * 4096) == sizeof(check));
        if (i % 8 != 7)
            CHECK(memcmp(check, data[i], sizeof(check)) == 0);
    }
    for (int i = 0; i < IMAGES; i++)
        close(images[i].fd);
}

/* A server: a thread that ends steps some time after they were started, in any order. */
struct fake_server {
    struct blk_remote remote;
    unsigned attached, detached;
    bool closed;
};

struct fake_link {
    struct blk_link link;
    int timer; /* stands for a socket */
    unsigned count;
    struct {
        struct blk_request *request;
        int64_t result;
    } under_way[64];
};

static struct blk_link *fake_attach(struct blk_remote *remote, int epoll_fd)
{
    struct fake_link *link = calloc(1, sizeof(*link));
    struct epoll_event event = {.events = EPOLLIN};

    link->timer = eventfd(0, EFD_NONBLOCK);
    CHECK(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, link->timer, &event) == 0);
    ((struct fake_server *)remote)->attached++;
    return &link->link;
}

static void fake_detach(struct blk_link *base)
{
    struct fake_link *link = (struct fake_link *)base;

    CHECK(link->count == 0);
    ((struct fake_server *)base->remote)->detached++;
    close(link->timer);
    free(link);
}

static bool fake_start(struct blk_link *base, struct blk_request *request,
                       const struct blk_step *step, int64_t *result)
{
    struct fake_link *link = (struct fake_link *)base;

    *result = 0;
    if (step->kind == BLK_STEP_READ || step->kind == BLK_STEP_WRITE)
        *result = rand() % 2 && step->iov->iov_len > 512 ? 512 : (int64_t)step->iov->iov_len;
    if (step->kind == BLK_STEP_READ)
        memset(step->iov->iov_base, 0x5a, (size_t)*result);
    if (rand() % 4 == 0)
        return true;
    link->under_way[link->count].request = request;
    link->under_way[link->count++].result = *result;
    if (rand() % 2)
        eventfd_signal(link->timer);
    else
        base->ready = true;
    return false;
}

static void fake_service(struct blk_link *base)
{
    struct fake_link *link = (struct fake_link *)base;

    base->ready = false;
    base->gone = ((struct fake_server *)base->remote)->closed;
    eventfd_take(link->timer);
    while (link->count > 0) {
        unsigned at = (unsigned)rand() % link->count;
        struct blk_request *request = link->under_way[at].request;
        int64_t result = link->under_way[at].result;

        link->under_way[at] = link->under_way[--link->count];
        base->done(base->io, request, result); /* may start another */
    }
}

static void test_images_that_others_serve(enum blk_engine engine)
{
    enum { DEPTH = 32 };
    struct fake_server servers[2] = {
        {.remote = {fake_attach, fake_detach, fake_start, fake_service}},
        {.remote = {fake_attach, fake_detach, fake_start, fake_service}},
    };
    struct blk_image images[3];
    struct blk_io *io = blk_io_create(engine, DEPTH);
    static uint8_t data[DEPTH][4096];
    static struct iovec iov[DEPTH][2];
    static struct blk_request requests[DEPTH];

    CHECK(io);
    for (int i = 0; i < 3; i++) {
        images[i] = (struct blk_image){.fd = -1, .size = 1 << 20, .block_size = 512};
        if (i < 2) {
            images[i].remote = &servers[i].remote;
            images[i].one_buffer = true;
        } else {
            images[i].fd = temporary_file(1 << 20);
        }
    }
    for (int round = 0; round < 50; round++) {
        done_count = 0;
        for (int i = 0; i < DEPTH; i++) {
            memset(data[i], 0, sizeof(data[i]));
            iov[i][0] = (struct iovec){data[i], 1000};
            iov[i][1] = (struct iovec){data[i] + 1000, 3096};
            requests[i] = (struct blk_request){
                .image = &images[i % 3],
                .op = i % 8 == 7 ? BLK_FLUSH : BLK_READ,
                .offset = (uint64_t)i * 4096,
                .iov = iov[i],
                .iov_count = 2,
                .done = record_done,
            };
            blk_io_submit(io, &requests[i]);
        }
        while (blk_io_in_flight(io) > 0)
            CHECK(blk_io_wait(io, true) == 0);
        CHECK(outcome == 0 && done_count == DEPTH);
        if (round % 10 == 9) { /* the image is closed and opened again */
            servers[0].closed = true;
            CHECK(blk_io_wait(io, false) == 0);
            servers[0].closed = false;
        }
        for (int i = 0; i < DEPTH; i++)
            for (size_t at = 0; i % 8 != 7 && i % 3 != 2 && at < sizeof(data[i]); at++)
                CHECK(data[i][at] == 0x5a);
    }
    blk_io_destroy(io);
    CHECK(servers[0].attached == 5 && servers[0].detached == 5);
    CHECK(servers[1].attached == 1 && servers[1].detached == 1);
    close(images[2].fd);
}

/* --- queues --------------------------------------------------------------------------------- */

enum {
    QUEUE_SIZE = 64,
    AVAIL = 0x1000,
    USED = 0x2000,
    HEADERS = 0x3000,
    DATA = 0x10000,
    SLOTS = QUEUE_SIZE / 4, /* requests in flight: each has four descriptors */
    SLOT_BYTES = 16384,
    RAM = DATA + SLOTS * SLOT_BYTES,
    IMAGE = 1 << 20,
};

struct guest {
    uint8_t *ram;
    struct guest_mem memory;
    struct blk_image image;
    struct blk_image base; /* of `image`, if that is a snapshot */
    struct virtio_blk_device device;
    struct virtio_irq irq;
    uint32_t interrupt_status;
    int kick;
    struct virtio_blk_queue *queue;
    pthread_t thread;
    uint16_t avail_idx;
    uint16_t used_idx;
};

static void *run(void *argument)
{
    CHECK(virtio_blk_queue_run(argument) == VIRTIO_BLK_STOPPED);
    return NULL;
}

static void start_queue(struct guest *guest)
{
    CHECK(pthread_create(&guest->thread, NULL, run, guest->queue) == 0);
}

static void stop_queue(struct guest *guest)
{
    virtio_blk_queue_stop(guest->queue);
    CHECK(pthread_join(guest->thread, NULL) == 0);
}

static void create_guest(struct guest *guest, enum blk_engine engine)
{
    const struct virtq_config config = {0, AVAIL, USED, QUEUE_SIZE, true, true};

    *guest = (struct guest){
        .ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
        .kick = eventfd(0, EFD_NONBLOCK),
        .image = {
            .fd = temporary_file(IMAGE), .size = IMAGE, .block_size = 512, .buffer_align = 1},
        .device.image = &guest->image,
    };
    CHECK(guest->ram != MAP_FAILED);
    guest->memory = (struct guest_mem){1, {{0, RAM, guest->ram}}};
    guest->irq = (struct virtio_irq){
        .status = &guest->interrupt_status, .irqfd = eventfd(0, EFD_NONBLOCK)};
    guest->queue = virtio_blk_queue_create(&guest->device, engine, &guest->memory, &config,
                                           guest->kick, &guest->irq);
    CHECK(guest->queue);
}

static void make_snapshot(struct guest *guest)
{
    guest->base = guest->image;
    guest->image.fd = -1;
    guest->image.snapshot = blk_snapshot_create(&guest->base, temporary_file(IMAGE), IMAGE);
    CHECK(guest->image.snapshot);
}

static void destroy_guest(struct guest *guest)
{
    struct blk_snapshot *snapshot = guest->image.snapshot;

    virtio_blk_queue_destroy(guest->queue);
    if (snapshot) {
        close(snapshot->overlay.fd);
        blk_snapshot_destroy(snapshot);
        close(guest->base.fd);
    }
    close(guest->kick);
    close(guest->irq.irqfd);
    if (!snapshot)
        close(guest->image.fd);
    munmap(guest->ram, RAM);
}

/* Makes the request of `slot` available: its data in two buffers of any lengths. */
static void offer(struct guest *guest, unsigned slot, uint32_t type, uint64_t sector, uint32_t size)
{
    struct vring_desc *desc = (struct vring_desc *)guest->ram + 4 * slot;
    struct vring_avail *avail = (struct vring_avail *)(guest->ram + AVAIL);
    struct virtio_blk_outhdr header = {.type = type, .sector = sector};
    uint16_t flags = VRING_DESC_F_NEXT | (type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0);
    uint64_t header_gpa = HEADERS + 32 * slot;
    uint64_t data_gpa = DATA + (uint64_t)slot * SLOT_BYTES;
    uint32_t cut = size ? (uint32_t)rand() % size : 0;
    uint16_t at = (uint16_t)(4 * slot);

    memcpy(guest->ram + header_gpa, &header, sizeof(header));
    guest->ram[header_gpa + 16] = 0xEE;
    desc[0] = (struct vring_desc){header_gpa, 16, VRING_DESC_F_NEXT, at + 1};
    desc[1] = (struct vring_desc){data_gpa, cut, flags, at + 2};
    desc[2] = (struct vring_desc){data_gpa + cut, size - cut, flags, at + 3};
    desc[3] = (struct vring_desc){header_gpa + 16, 1, VRING_DESC_F_WRITE, 0};
    avail->ring[guest->avail_idx++ % QUEUE_SIZE] = at;
    __atomic_store_n(&avail->idx, guest->avail_idx, __ATOMIC_RELEASE);
    eventfd_signal(guest->kick);
}

/* The next request that came back, or -1. */
static int take_back(struct guest *guest)
{
    struct vring_used *used = (struct vring_used *)(guest->ram + USED);
    struct vring_avail *avail = (struct vring_avail *)(guest->ram + AVAIL);
    uint32_t slot;

    /* used_event: interrupt at the next one */
    __atomic_store_n(&avail->ring[QUEUE_SIZE], guest->used_idx, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&used->idx, __ATOMIC_ACQUIRE) == guest->used_idx)
        return -1;
    slot = used->ring[guest->used_idx++ % QUEUE_SIZE].id / 4;
    CHECK(slot < SLOTS && guest->ram[HEADERS + 32 * slot + 16] == VIRTIO_BLK_S_OK);
    return (int)slot;
}

static void wait_for_interrupt(struct guest *guest)
{
    struct pollfd poll_irq = {.fd = guest->irq.irqfd, .events = POLLIN};

    CHECK(poll(&poll_irq, 1, 10000) == 1);
    eventfd_take(guest->irq.irqfd);
}

/* Random reads and writes at depth, each slot in a part of the image of its own, against a model
 * of what the image holds; every now and then the queue is stopped and run again. */
static void test_random_io(enum blk_engine engine, bool snapshot)
{
    enum { PART = IMAGE / SLOTS, REQUESTS = 20000 };
    uint8_t *model = calloc(1, IMAGE), *check = malloc(IMAGE);
    struct {
        bool busy, reading;
        uint64_t offset;
        uint32_t size;
    } slots[SLOTS] = {0};
    unsigned offered = 0, returned = 0;
    struct guest guest;

    create_guest(&guest, engine);
    if (snapshot)
        make_snapshot(&guest);
    start_queue(&guest);
    while (returned < REQUESTS) {
        int slot;

        for (unsigned i = 0; i < SLOTS && offered < REQUESTS; i++) {
            uint8_t *data = guest.ram + DATA + (size_t)i * SLOT_BYTES;

            if (slots[i].busy || rand() % 2)
                continue;
            slots[i].busy = true;
            slots[i].reading = rand() % 2;
            slots[i].size = 512 * (1 + (uint32_t)rand() % (SLOT_BYTES / 512));
            slots[i].offset = i * PART + 512 * ((uint64_t)rand() % ((PART - SLOT_BYTES) / 512));
            if (!slots[i].reading) {
                memset(data, rand(), slots[i].size);
                memcpy(model + slots[i].offset, data, slots[i].size);
            }
            offer(&guest, i, slots[i].reading ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT,
                  slots[i].offset / 512, slots[i].size);
            offered++;
        }
        if (offered % 500 == 0) {
            stop_queue(&guest);
            start_queue(&guest);
        }
        while ((slot = take_back(&guest)) >= 0) {
            if (slots[slot].reading)
                CHECK(memcmp(guest.ram + DATA + (size_t)slot * SLOT_BYTES,
                             model + slots[slot].offset, slots[slot].size) == 0);
            CHECK(slots[slot].busy);
            slots[slot].busy = false;
            returned++;
        }
        if (returned < offered)
            wait_for_interrupt(&guest);
    }
    stop_queue(&guest);
    CHECK(virtio_blk_queue_counters(guest.queue).requests == REQUESTS);
    if (snapshot) { /* each sector shows what the guest wrote, or still the empty base */
        CHECK(pread(guest.image.snapshot->overlay.fd, check, IMAGE, 0) == IMAGE);
        CHECK(memcmp(check, model, IMAGE) == 0);
        memset(model, 0, IMAGE);
    }
    CHECK(pread(snapshot ? guest.base.fd : guest.image.fd, check, IMAGE, 0) == IMAGE);
    CHECK(memcmp(check, model, IMAGE) == 0);
    destroy_guest(&guest);
    free(model);
    free(check);
}

/* What a limit holds is kept while the queue does not run. */
static void test_stops_under_a_limit(enum blk_engine engine)
{
    struct guest guest;
    unsigned returned = 0;

    create_guest(&guest, engine);
    blk_limit_set(&guest.image, 100, 0);
    start_queue(&guest);
    for (unsigned round = 1; round <= 3; round++) {
        for (unsigned i = 0; i < SLOTS; i++)
            offer(&guest, i, VIRTIO_BLK_T_IN, i, 512);
        while (returned < round * SLOTS) {
            if (take_back(&guest) >= 0) {
                returned++;
            } else if (rand() % 4 > 0) {
                wait_for_interrupt(&guest);
            } else {
                stop_queue(&guest);
                start_queue(&guest);
            }
        }
    }
    CHECK(virtio_blk_queue_counters(guest.queue).requests == 3 * SLOTS);
    for (unsigned i = 0; i < SLOTS; i++)
        offer(&guest, i, VIRTIO_BLK_T_DISCARD, 0, 16);
    stop_queue(&guest); /* and nobody goes on with them */
    destroy_guest(&guest);
}

/* What was stopped before it ran makes one pass, and ends. */
static void test_stopped_before_it_ran(enum blk_engine engine)
{
    struct guest guest;

    create_guest(&guest, engine);
    offer(&guest, 3, VIRTIO_BLK_T_IN, 0, 512);
    virtio_blk_queue_stop(guest.queue);
    CHECK(virtio_blk_queue_run(guest.queue) == VIRTIO_BLK_STOPPED);
    CHECK(take_back(&guest) == 3);
    destroy_guest(&guest);
}

static void test_a_ring_that_makes_no_sense(enum blk_engine engine)
{
    struct guest guest;

    create_guest(&guest, engine);
    ((struct vring_avail *)(guest.ram + AVAIL))->idx = QUEUE_SIZE + 1;
    CHECK(virtio_blk_queue_run(guest.queue) == VIRTIO_BLK_BROKEN);
    CHECK(virtio_blk_queue_run(guest.queue) == VIRTIO_BLK_BROKEN);
    destroy_guest(&guest);
}

int main(void)
{
    int uring = blk_io_uring_check();

    test_short_transfers_go_on();
    test_ends_and_errors_of_transfers();
    test_more_buffers_than_one_call_takes();
    test_misaligned_buffers_are_bounced();
    test_a_failed_bounce_frees_its_buffer();
    test_discard_tries_each_way_once();
    test_zeroes_are_written_at_last();
    test_an_error_ends_the_ranges();
    test_a_failed_request_can_be_submitted_again();
    test_runs_of_a_snapshot();
    test_marks_cover_whole_sectors();
    if (uring < 0)
        fprintf(stderr, "test_blk: no io_uring here (%s): only the other engine is tested\n",
                strerror(-uring));
    for (int engine = uring < 0 ? BLK_ENGINE_SYNC : BLK_ENGINE_IO_URING;
         engine <= BLK_ENGINE_SYNC; engine++) {
        test_a_watched_eventfd_ends_the_wait(engine);
        test_every_request_is_done_once(engine);
        test_random_io(engine, false);
        test_random_io(engine, true);
        test_images_that_others_serve(engine);
        test_stops_under_a_limit(engine);
        test_stopped_before_it_ran(engine);
        test_a_ring_that_makes_no_sense(engine);
    }
    return 0;
}
