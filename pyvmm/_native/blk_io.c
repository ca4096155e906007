#include "blk_io.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "blk_remote.h"
#include "blk_step.h"

/* Of linux/blkdev.h since 6.12; older headers lack it, older kernels answer -EOPNOTSUPP. */
#ifndef BLOCK_URING_CMD_DISCARD
#define BLOCK_URING_CMD_DISCARD _IO(0x12, 0)
#endif

#define OWN_WATCHES 2u /* links_fd, timer_fd */
#define ALL_WATCHES (BLK_IO_MAX_WATCHES + OWN_WATCHES)

struct blk_io {
    enum blk_engine engine;
    uint32_t in_flight;
    struct io_uring ring; /* BLK_ENGINE_IO_URING */
    int epoll_fd;         /* BLK_ENGINE_SYNC */
    uint32_t watches;
    int watched[ALL_WATCHES];
    struct blk_link *links; /* to the servers of images */
    int links_fd;           /* epoll: what they wait for; -1 until there is one */
    struct blk_request *held; /* by limits, the first to start first */
    int timer_fd;             /* -1 until a request was held */
    uint64_t timer_at;
};

bool blk_image_in_memory(int fd)
{
    struct statfs status;

    if (fstatfs(fd, &status) < 0)
        return false;
    return status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC ||
           status.f_type == HUGETLBFS_MAGIC;
}

bool blk_image_can_punch(int fd, uint64_t size)
{
    /* Beyond its end there is nothing to lose. */
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)size, 4096) == 0;
}

static void finish(struct blk_io *io, struct blk_request *request, int error)
{
    assert(io->in_flight > 0);
    io->in_flight--;
    request->done(request, error);
}

/* --- plain system calls ------------------------------------------------------------------- */

static int64_t sync_do(const struct blk_step *step)
{
    int fd = step->image->fd;
    uint64_t range[2] = {step->offset, step->length};
    off_t offset = (off_t)step->offset;
    int64_t result = -1;

    switch (step->kind) {
    case BLK_STEP_READ:
        result = preadv2(fd, step->iov, (int)step->iov_count, offset, 0);
        break;
    case BLK_STEP_WRITE:
        result = pwritev2(fd, step->iov, (int)step->iov_count, offset,
                          step->stable ? RWF_DSYNC : 0);
        break;
    case BLK_STEP_SYNC:
        result = fdatasync(fd);
        break;
    case BLK_STEP_ALLOCATE:
        result = fallocate(fd, step->mode, offset, (off_t)step->length);
        break;
    case BLK_STEP_DISCARD:
        result = ioctl(fd, BLKDISCARD, range);
        break;
    }
    return result < 0 ? -errno : result;
}

static int sync_wait(struct blk_io *io)
{
    struct epoll_event events[ALL_WATCHES];

    if (epoll_wait(io->epoll_fd, events, ALL_WATCHES, -1) < 0 && errno != EINTR)
        return -errno;
    return 0;
}

static int sync_watch(struct blk_io *io, int fd)
{
    /* Edge-triggered, so that nobody has to read an eventfd. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};

    return epoll_ctl(io->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

/* --- io_uring ----------------------------------------------------------------------------- */

/* user_data of a watch: its index and this bit, which no request's address has. */
#define WATCH_TAG 1u

static struct io_uring_sqe *next_sqe(struct blk_io *io)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);

    assert(sqe); /* a request has one entry at a time, and the ring has one for each */
    return sqe;
}

static void uring_do(struct blk_io *io, struct blk_request *request, const struct blk_step *step)
{
    struct io_uring_sqe *sqe = next_sqe(io);
    int fd = step->image->fd;
    int write_flags = step->stable ? RWF_DSYNC : 0;
    bool single = step->iov_count == 1 && step->iov->iov_len <= INT32_MAX;

    switch (step->kind) {
    case BLK_STEP_READ:
        if (single)
            io_uring_prep_read(sqe, fd, step->iov->iov_base,
                               (unsigned)step->iov->iov_len, step->offset);
        else
            io_uring_prep_readv(sqe, fd, step->iov, step->iov_count, step->offset);
        break;
    case BLK_STEP_WRITE:
        if (single) {
            io_uring_prep_write(sqe, fd, step->iov->iov_base,
                                (unsigned)step->iov->iov_len, step->offset);
            sqe->rw_flags = write_flags;
        } else {
            io_uring_prep_writev2(sqe, fd, step->iov, step->iov_count, step->offset,
                                  write_flags);
        }
        break;
    case BLK_STEP_SYNC:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    case BLK_STEP_ALLOCATE:
        io_uring_prep_fallocate(sqe, fd, step->mode, (off_t)step->offset,
                                (off_t)step->length);
        break;
    case BLK_STEP_DISCARD:
        io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0);
        sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
        sqe->addr = step->offset;
        sqe->addr3 = step->length;
        break;
    }
    io_uring_sqe_set_data(sqe, request);
}

static bool remote_do(struct blk_io *io, struct blk_request *request, const struct blk_step *step,
                      int64_t *result);

/* Does steps until one is under way, or the request is done. */
static void go_on(struct blk_io *io, struct blk_request *request, enum blk_next next,
                  struct blk_step *step, int error)
{
    while (next == BLK_STEP) {
        int64_t result;

        if (step->image->remote) {
            if (!remote_do(io, request, step, &result))
                return;
        } else if (io->engine == BLK_ENGINE_IO_URING && !step->image->in_memory) {
            uring_do(io, request, step);
            return;
        } else {
            result = sync_do(step);
        }
        next = blk_step_next(request, result, step, &error);
    }
    finish(io, request, error);
}

/* Multishot, and edge-triggered by default: armed once, it completes at each signal, so that a
 * notification costs neither a read of the eventfd nor a new submission. */
static void arm_watch(struct blk_io *io, uint32_t index)
{
    struct io_uring_sqe *sqe = next_sqe(io);

    io_uring_prep_poll_multishot(sqe, io->watched[index], EPOLLIN);
    io_uring_sqe_set_data64(sqe, (uint64_t)index << 1 | WATCH_TAG);
}

static void uring_complete(struct blk_io *io, uint64_t user_data, int32_t result, uint32_t flags)
{
    struct blk_request *request = (struct blk_request *)(uintptr_t)user_data;
    struct blk_step step;
    enum blk_next next;
    int error = 0;

    if (user_data & WATCH_TAG) {
        if (!(flags & IORING_CQE_F_MORE)) /* the kernel gave up on it, e.g. short of memory */
            arm_watch(io, (uint32_t)(user_data >> 1));
        return;
    }
    next = blk_step_next(request, result, &step, &error);
    if (next == BLK_DONE)
        finish(io, request, error);
    else
        go_on(io, request, next, &step, error);
}

static int uring_wait(struct blk_io *io, bool block)
{
    struct io_uring_cqe *cqe;
    unsigned head;
    unsigned count = 0;
    int result;

    if (block)
        result = io_uring_submit_and_wait(&io->ring, 1);
    else
        result = io_uring_submit_and_get_events(&io->ring);
    if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY)
        return result;
    io_uring_for_each_cqe(&io->ring, head, cqe) {
        uring_complete(io, cqe->user_data, cqe->res, cqe->flags);
        count++;
    }
    io_uring_cq_advance(&io->ring, count);
    return 0;
}

/* Makes either engine's wait end when `fd` becomes readable. 0 or -errno. */
static int add_watch(struct blk_io *io, int fd)
{
    int result = 0;

    if (io->engine == BLK_ENGINE_SYNC)
        result = sync_watch(io, fd);
    if (result < 0)
        return result;
    io->watched[io->watches++] = fd;
    if (io->engine == BLK_ENGINE_IO_URING)
        arm_watch(io, io->watches - 1);
    return 0;
}

/* --- images that others serve --------------------------------------------------------------- */

static void remote_done(struct blk_io *io, struct blk_request *request, int64_t result)
{
    struct blk_step step;
    int error = 0;
    enum blk_next next = blk_step_next(request, result, &step, &error);

    go_on(io, request, next, &step, error);
}

static int open_links(struct blk_io *io)
{
    int fd;

    if (io->links_fd >= 0)
        return 0;
    fd = epoll_create1(EPOLL_CLOEXEC);
    if (fd < 0 || add_watch(io, fd) < 0) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    io->links_fd = fd;
    return 0;
}

static struct blk_link *attach(struct blk_io *io, struct blk_remote *remote)
{
    struct blk_link *link;

    if (open_links(io) < 0)
        return NULL;
    link = remote->attach(remote, io->links_fd);
    if (!link)
        return NULL;
    link->remote = remote;
    link->io = io;
    link->done = remote_done;
    link->next = io->links;
    io->links = link;
    return link;
}

/* True if the step is done already. */
static bool remote_do(struct blk_io *io, struct blk_request *request, const struct blk_step *step,
                      int64_t *result)
{
    struct blk_remote *remote = step->image->remote;
    struct blk_link *link = io->links;

    while (link && link->remote != remote)
        link = link->next;
    if (!link)
        link = attach(io, remote);
    if (link)
        return remote->start(link, request, step, result);
    *result = -EIO;
    return true;
}

/* Whether a link has something to do at once. */
static bool links_ready(const struct blk_io *io)
{
    for (const struct blk_link *link = io->links; link; link = link->next)
        if (link->ready)
            return true;
    return false;
}

static void service_links(struct blk_io *io)
{
    struct blk_link **place = &io->links;
    struct blk_link *link;

    while ((link = *place)) {
        link->remote->service(link);
        if (link->gone) {
            *place = link->next;
            link->remote->detach(link);
        } else {
            place = &link->next;
        }
    }
}

/* --- limits -------------------------------------------------------------------------------- */

static uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void begin(struct blk_io *io, struct blk_request *request)
{
    struct blk_step step;
    int error = 0;
    enum blk_next next = blk_step_first(request, &step, &error);

    go_on(io, request, next, &step, error);
}

static uint32_t limit_generation(const struct blk_request *request)
{
    return __atomic_load_n(&request->image->limit.generation, __ATOMIC_ACQUIRE);
}

/* Asks the limit when the request may start. */
static void claim(struct blk_request *request, uint64_t now)
{
    uint64_t bytes = 0;

    if (request->op == BLK_READ || request->op == BLK_WRITE)
        for (uint32_t i = 0; i < request->iov_count; i++)
            bytes += request->iov[i].iov_len;
    request->generation = limit_generation(request);
    request->start = blk_limit_reserve(&request->image->limit, now, bytes);
}

static void hold(struct blk_io *io, struct blk_request *request)
{
    struct blk_request **place = &io->held;

    while (*place && (*place)->start <= request->start)
        place = &(*place)->next_held;
    request->next_held = *place;
    *place = request;
}

static int open_timer(struct blk_io *io)
{
    int fd;

    if (io->timer_fd >= 0)
        return 0;
    fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0 || add_watch(io, fd) < 0) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    io->timer_fd = fd;
    return 0;
}

/* Whether the request has to wait, which it then does in `held`. */
static bool held_by_limit(struct blk_io *io, struct blk_request *request)
{
    struct blk_limit *limit = &request->image->limit;
    uint64_t now;

    if (!(__atomic_load_n(&limit->iops, __ATOMIC_RELAXED) |
          __atomic_load_n(&limit->bps, __ATOMIC_RELAXED)) || request->op == BLK_FLUSH)
        return false;
    now = now_ns();
    claim(request, now);
    if (request->start <= now || open_timer(io) < 0)
        return false;
    hold(io, request);
    return true;
}

/* Asks again for those whose limit has changed, in their order. */
static void claim_again(struct blk_io *io, uint64_t now)
{
    struct blk_request *all = io->held;
    struct blk_request *request;
    bool changed = false;

    for (request = all; request; request = request->next_held)
        changed |= request->generation != limit_generation(request);
    if (!changed)
        return;
    io->held = NULL;
    while ((request = all)) {
        all = request->next_held;
        if (request->generation != limit_generation(request))
            claim(request, now);
        hold(io, request);
    }
}

/* Begins the held requests whose time has come, and sets the timer for the next one. Whether there
 * were any. */
static bool release_held(struct blk_io *io)
{
    struct blk_request *request;
    uint64_t now = now_ns();
    bool released = false;

    claim_again(io, now);
    while ((request = io->held) && request->start <= now) {
        io->held = request->next_held;
        begin(io, request);
        released = true;
    }
    if (io->held && io->held->start != io->timer_at) {
        struct itimerspec spec;

        io->timer_at = io->held->start;
        spec = (struct itimerspec){.it_value = {(time_t)(io->timer_at / 1000000000u),
                                                (long)(io->timer_at % 1000000000u)}};
        timerfd_settime(io->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
    }
    return released;
}

void blk_io_cancel_held(struct blk_io *io)
{
    struct blk_request *request;

    while ((request = io->held)) {
        io->held = request->next_held;
        finish(io, request, -ECANCELED);
    }
}

/* --- create, destroy, wait ------------------------------------------------------------------ */

/* Creates a ring with the best flags that this kernel has: completions are only processed when we
 * wait for them (6.1), or at least without interrupting us (5.19). */
static int init_ring(struct io_uring *ring, uint32_t entries)
{
    static const unsigned flags[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN,
        0,
    };
    int result = -EINVAL;

    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]) && result == -EINVAL; i++)
        result = io_uring_queue_init(entries, ring, flags[i]);
    if (result < 0)
        return result;
    /* Came with 5.13, as multishot poll did, which cannot be asked for by itself. */
    if (!(ring->features & IORING_FEAT_RSRC_TAGS)) {
        io_uring_queue_exit(ring);
        return -ENOSYS;
    }
    return 0;
}

int blk_io_uring_check(void)
{
    struct io_uring ring;
    int result = init_ring(&ring, 1);

    if (result == 0)
        io_uring_queue_exit(&ring);
    return result;
}

static int open_engine(struct blk_io *io, uint32_t depth)
{
    int result;

    if (io->engine == BLK_ENGINE_SYNC) {
        io->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        return io->epoll_fd < 0 ? -errno : 0;
    }
    result = init_ring(&io->ring, depth + ALL_WATCHES);
    if (result < 0)
        return result;
    /* Images are not registered with the ring: the kernel takes rings apart some time after their
     * process has gone, and until then a registered file lives on, with its lock. */
    io_uring_register_ring_fd(&io->ring); /* since 5.18: a cheaper io_uring_enter */
    return 0;
}

struct blk_io *blk_io_create(enum blk_engine engine, uint32_t depth)
{
    struct blk_io *io = calloc(1, sizeof(*io));
    int result;

    if (!io)
        return NULL;
    io->engine = engine;
    io->links_fd = -1;
    io->timer_fd = -1;
    result = open_engine(io, depth);
    if (result < 0) {
        free(io);
        errno = -result;
        return NULL;
    }
    return io;
}

void blk_io_destroy(struct blk_io *io)
{
    struct blk_link *link;

    if (!io)
        return;
    while ((link = io->links)) {
        io->links = link->next;
        link->remote->detach(link);
    }
    if (io->links_fd >= 0)
        close(io->links_fd);
    if (io->timer_fd >= 0)
        close(io->timer_fd);
    if (io->engine == BLK_ENGINE_SYNC)
        close(io->epoll_fd);
    else
        io_uring_queue_exit(&io->ring);
    free(io);
}

int blk_io_watch(struct blk_io *io, int eventfd)
{
    uint32_t own = (io->links_fd >= 0) + (io->timer_fd >= 0);

    return io->watches - own == BLK_IO_MAX_WATCHES ? -ENOSPC : add_watch(io, eventfd);
}

void blk_io_submit(struct blk_io *io, struct blk_request *request)
{
    io->in_flight++;
    if (!held_by_limit(io, request))
        begin(io, request);
}

int blk_io_wait(struct blk_io *io, bool block)
{
    int result = 0;

    if (io->held && release_held(io))
        block = false;
    if (links_ready(io)) {
        service_links(io);
        block = false;
    }
    if (io->engine == BLK_ENGINE_IO_URING)
        result = uring_wait(io, block);
    else if (block)
        result = sync_wait(io);
    service_links(io);
    return result;
}

uint32_t blk_io_in_flight(const struct blk_io *io)
{
    return io->in_flight;
}
