/* Block I/O on open images, for any front end: requests go in, each names its image and comes back
 * exactly once through its `done`.
 *
 * Two engines run the same requests: io_uring, and plain system calls that complete a request
 * within blk_io_submit. The second is for hosts without io_uring, and either engine uses it for
 * images that lie in memory (tmpfs has no asynchronous reads: io_uring would hand each one to a
 * kernel thread).
 *
 * One thread at a time uses a blk_io, from blk_io_create to blk_io_destroy; any number of them, and
 * any number of requests, share an image. */
#ifndef PYVMM_BLK_IO_H
#define PYVMM_BLK_IO_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "blk_limit.h"

struct blk_remote;
struct blk_snapshot;

/* Offsets and lengths are bytes and multiples of `block_size`, which the front end checks. */
struct blk_image {
    int fd;
    uint64_t size;
    uint32_t block_size;   /* smallest unit the image can be read or written in; at least 512 */
    uint32_t buffer_align; /* what O_DIRECT asks of addresses; 1: nothing (the page cache) */
    bool is_block_device;
    bool in_memory;        /* see blk_image_in_memory */
    bool one_buffer;       /* a step takes a single buffer: what is scattered is bounced */
    bool no_fua;           /* a write that is to be stable needs a flush after it */
    struct blk_snapshot *snapshot; /* if not NULL: where the sectors lie, instead of in `fd` */
    struct blk_remote *remote;     /* if not NULL: who serves it, instead of `fd` */
    struct blk_limit limit;
    uint32_t unsupported;  /* the engine's, 0 at first: what failed and is not tried again */
};

/* Whether the file lies on a file system in memory, where nothing waits for a disk. */
bool blk_image_in_memory(int fd);

/* Whether the regular file of `size` bytes can give space back. */
bool blk_image_can_punch(int fd, uint64_t size);

enum blk_op { BLK_READ, BLK_WRITE, BLK_FLUSH, BLK_DISCARD, BLK_WRITE_ZEROES };

struct blk_range {
    uint64_t offset;
    uint64_t length;
};

/* What is left of a request, see blk_step.c. */
struct blk_progress {
    uint64_t offset;
    uint64_t remaining;
    const uint8_t *methods;
    uint8_t *bounce;
    struct iovec buffer;
    struct iovec *shortened; /* this buffer by `withheld` bytes, for one step */
    uint64_t withheld;
    bool syncing;
};

struct blk_request {
    struct blk_image *image; /* outlives the request */
    enum blk_op op;
    bool stable;    /* WRITE, WRITE_ZEROES: on stable storage when done */
    bool may_unmap; /* WRITE_ZEROES: may give the space back */

    /* READ, WRITE. The array belongs to the engine until `done`: it is used up. */
    uint64_t offset;
    struct iovec *iov;
    uint32_t iov_count;

    /* DISCARD, WRITE_ZEROES. Processed in order. */
    const struct blk_range *ranges;
    uint32_t range_count;

    /* `error` is 0 or -errno; -EOPNOTSUPP when the image cannot discard, -ECANCELED by
     * blk_io_cancel_held. After an error, the request as it is now is what is left to do: to submit
     * it again is to try again. */
    void (*done)(struct blk_request *request, int error);

    /* The engine's. */
    struct blk_progress progress;
    struct blk_request *next_held; /* by the image's limit */
    uint64_t start;                /* until then, CLOCK_MONOTONIC in ns */
    uint32_t generation;           /* of the limit that said so */
};

enum blk_engine { BLK_ENGINE_IO_URING, BLK_ENGINE_SYNC };

struct blk_io;

/* 0 if this process may use io_uring and the kernel's is recent enough (Linux 5.13), else
 * -errno: -EPERM forbidden (sysctl kernel.io_uring_disabled, seccomp), -ENOSYS none or too old. */
int blk_io_uring_check(void);

/* `depth` is the largest number of requests in flight. NULL with errno set on failure. */
struct blk_io *blk_io_create(enum blk_engine engine, uint32_t depth);

/* No request may be in flight, unless blk_io_wait failed. */
void blk_io_destroy(struct blk_io *io);

/* Makes blk_io_wait return when the eventfd is signalled from now on (or was before, at least
 * once). Its count is never read: each signal wakes once. At most BLK_IO_MAX_WATCHES of them.
 * 0 or -errno. */
#define BLK_IO_MAX_WATCHES 4
int blk_io_watch(struct blk_io *io, int eventfd);

/* Queues the request; it starts no later than in the next blk_io_wait, and may be done on return.
 * It must stay as it is until `done`. */
void blk_io_submit(struct blk_io *io, struct blk_request *request);

/* Starts what was queued and calls `done` for what has ended. With `block`, sleeps until a
 * request ends or a watched eventfd is signalled. 0, or -errno when the engine cannot go on. */
int blk_io_wait(struct blk_io *io, bool block);

/* Ends the requests that the limits of their images still hold, with -ECANCELED. */
void blk_io_cancel_held(struct blk_io *io);

/* Requests submitted and not done. */
uint32_t blk_io_in_flight(const struct blk_io *io);

#endif
