#include "blk_step.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>

#include "blk_snapshot.h"

/* The most that a guest can make the monitor allocate for one request. */
#define BOUNCE_SIZE (256u << 10)
#define BOUNCE_ALIGN 4096u

/* Ways to discard or to zero a range, best first in each list; NO_METHOD ends it. What an image
 * answers with -EOPNOTSUPP is a bit in its `unsupported`. */
enum method {
    NO_METHOD,
    PUNCH_HOLE,
    ZERO_RANGE,
    DISCARD_DEVICE,
    WRITE_ZERO_BYTES,
};

static const uint8_t discard_file[] = {PUNCH_HOLE, NO_METHOD};
static const uint8_t discard_device[] = {DISCARD_DEVICE, PUNCH_HOLE, NO_METHOD};
static const uint8_t zero_or_unmap[] = {PUNCH_HOLE, ZERO_RANGE, WRITE_ZERO_BYTES, NO_METHOD};
static const uint8_t zero_in_place[] = {ZERO_RANGE, WRITE_ZERO_BYTES, NO_METHOD};

/* Never written, so it costs no memory: every page of it is the kernel's page of zeroes. */
static uint8_t zeroes[1u << 20] __attribute__((aligned(BOUNCE_ALIGN)));

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Whether the image takes these buffers; O_DIRECT has demands (open(2), statx(2) STATX_DIOALIGN). */
static bool buffers_fit(const struct blk_request *request)
{
    const struct blk_image *image = request->image;
    uint64_t misaligned = 0;

    if (image->one_buffer && request->iov_count > 1)
        return false;
    if (image->buffer_align <= 1)
        return true;
    for (uint32_t i = 0; i < request->iov_count; i++) {
        misaligned |= (uintptr_t)request->iov[i].iov_base & (image->buffer_align - 1);
        misaligned |= request->iov[i].iov_len & (image->block_size - 1);
    }
    return misaligned == 0;
}

/* Copies between the bounce buffer and the first `size` bytes of the request's buffers. */
static void copy_bounce(const struct blk_request *request, uint64_t size)
{
    uint8_t *bounce = request->progress.bounce;

    for (const struct iovec *iov = request->iov; size > 0; iov++) {
        uint64_t chunk = min_u64(iov->iov_len, size);

        if (request->op == BLK_READ)
            memcpy(iov->iov_base, bounce, chunk);
        else
            memcpy(bounce, iov->iov_base, chunk);
        bounce += chunk;
        size -= chunk;
    }
}

/* Leaves the first `size` bytes of the request's buffers for the next step; returns in how many
 * buffers they are. */
static uint32_t shorten_buffers(struct blk_request *request, uint64_t size)
{
    struct iovec *iov = request->iov;

    for (; iov->iov_len < size; iov++)
        size -= iov->iov_len;
    request->progress.shortened = iov;
    request->progress.withheld = iov->iov_len - size;
    iov->iov_len = size;
    return (uint32_t)(iov - request->iov) + 1;
}

static void lengthen_buffers(struct blk_request *request)
{
    struct blk_progress *progress = &request->progress;

    if (progress->shortened)
        progress->shortened->iov_len += progress->withheld;
    progress->shortened = NULL;
}

static void skip_buffers(struct blk_request *request, uint64_t size)
{
    while (size > 0) {
        struct iovec *iov = request->iov;
        uint64_t chunk = min_u64(iov->iov_len, size);

        size -= chunk;
        iov->iov_base = (uint8_t *)iov->iov_base + chunk;
        iov->iov_len -= chunk;
        if (iov->iov_len == 0) {
            request->iov++;
            request->iov_count--;
        }
    }
}

static enum blk_next done(struct blk_request *request, int outcome, int *error)
{
    struct blk_progress *progress = &request->progress;

    free(progress->bounce);
    progress->bounce = NULL;
    if (outcome < 0 && !progress->syncing) { /* what is left to do: see blk_request.done */
        if (request->op == BLK_READ || request->op == BLK_WRITE) {
            request->offset = progress->offset;
        } else if (progress->remaining > 0) {
            request->ranges--;
            request->range_count++;
        }
    }
    *error = outcome;
    return BLK_DONE;
}

static enum blk_next sync_step(struct blk_request *request, struct blk_step *step)
{
    request->progress.syncing = true;
    *step = (struct blk_step){.image = request->image, .kind = BLK_STEP_SYNC};
    return BLK_STEP;
}

static enum blk_next transfer_step(struct blk_request *request, struct blk_step *step)
{
    struct blk_progress *progress = &request->progress;
    struct blk_image *image = request->image;
    struct blk_snapshot *snapshot = image->snapshot;
    uint64_t length = progress->remaining;
    uint32_t iov_count = request->iov_count;

    if (snapshot) {
        if (request->op == BLK_READ)
            image = blk_snapshot_locate(snapshot, progress->offset, &length);
        else
            image = &snapshot->overlay;
    }
    if (length < progress->remaining && !progress->bounce)
        iov_count = shorten_buffers(request, length);
    *step = (struct blk_step){
        .image = image,
        .kind = request->op == BLK_READ ? BLK_STEP_READ : BLK_STEP_WRITE,
        .stable = request->stable && !snapshot,
        .offset = progress->offset,
        .iov = request->iov,
        .iov_count = iov_count < IOV_MAX ? iov_count : IOV_MAX,
    };
    if (progress->bounce) {
        progress->buffer.iov_base = progress->bounce;
        progress->buffer.iov_len = min_u64(length, BOUNCE_SIZE);
        if (request->op == BLK_WRITE)
            copy_bounce(request, progress->buffer.iov_len);
        step->iov = &progress->buffer;
        step->iov_count = 1;
    }
    return BLK_STEP;
}

static enum blk_next finish_transfer(struct blk_request *request, struct blk_step *step,
                                     int *error)
{
    if (request->stable && request->image->no_fua)
        return sync_step(request, step);
    return done(request, 0, error);
}

static enum blk_next first_transfer(struct blk_request *request, struct blk_step *step,
                                    int *error)
{
    struct blk_progress *progress = &request->progress;

    progress->offset = request->offset;
    for (uint32_t i = 0; i < request->iov_count; i++)
        progress->remaining += request->iov[i].iov_len;
    if (progress->remaining == 0)
        return finish_transfer(request, step, error);
    if (!buffers_fit(request)) {
        progress->bounce = aligned_alloc(BOUNCE_ALIGN, BOUNCE_SIZE);
        if (!progress->bounce)
            return done(request, -ENOMEM, error);
    }
    return transfer_step(request, step);
}

static enum blk_next next_transfer(struct blk_request *request, int64_t result,
                                   struct blk_step *step, int *error)
{
    struct blk_progress *progress = &request->progress;
    struct blk_snapshot *snapshot = request->image->snapshot;

    lengthen_buffers(request);
    if (result == -EINTR || result == -EAGAIN)
        return transfer_step(request, step);
    if (result < 0)
        return done(request, (int)result, error);
    if (result == 0) /* the image became shorter, or takes no more */
        return done(request, -EIO, error);
    if (progress->bounce && request->op == BLK_READ)
        copy_bounce(request, (uint64_t)result);
    if (snapshot && request->op == BLK_WRITE)
        blk_snapshot_mark(snapshot, progress->offset, progress->offset + (uint64_t)result);
    skip_buffers(request, (uint64_t)result);
    progress->offset += (uint64_t)result;
    progress->remaining -= (uint64_t)result;
    if (progress->remaining > 0)
        return transfer_step(request, step);
    return finish_transfer(request, step, error);
}

/* Where the ranges of the request are discarded or zeroed. */
static struct blk_image *ranges_image(const struct blk_request *request)
{
    struct blk_image *image = request->image;

    return image->snapshot ? &image->snapshot->overlay : image;
}

/* Does the rest of the current range by the best method left. */
static enum blk_next range_step(struct blk_request *request, struct blk_step *step, int *error)
{
    struct blk_progress *progress = &request->progress;
    struct blk_image *image = ranges_image(request);
    uint32_t unsupported = __atomic_load_n(&image->unsupported, __ATOMIC_RELAXED);

    while (unsupported & (1u << *progress->methods))
        progress->methods++;
    *step = (struct blk_step){
        .image = image,
        .kind = BLK_STEP_ALLOCATE,
        .offset = progress->offset,
        .length = progress->remaining,
    };
    switch ((enum method)*progress->methods) {
    case NO_METHOD:
        return done(request, -EOPNOTSUPP, error);
    case PUNCH_HOLE:
        step->mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        break;
    case ZERO_RANGE:
        step->mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
        break;
    case DISCARD_DEVICE:
        step->kind = BLK_STEP_DISCARD;
        break;
    case WRITE_ZERO_BYTES:
        step->kind = BLK_STEP_WRITE;
        step->stable = request->stable && !request->image->snapshot;
        progress->buffer.iov_base = zeroes;
        progress->buffer.iov_len = min_u64(progress->remaining, sizeof(zeroes));
        step->iov = &progress->buffer;
        step->iov_count = 1;
        break;
    }
    return BLK_STEP;
}

static const uint8_t *range_methods(const struct blk_request *request)
{
    if (request->image->snapshot) /* what is discarded must not show the base again */
        return zero_or_unmap;
    if (request->op == BLK_DISCARD)
        return request->image->is_block_device || request->image->remote ? discard_device
                                                                          : discard_file;
    return request->may_unmap ? zero_or_unmap : zero_in_place;
}

/* Takes ranges off the list until one is not empty. */
static enum blk_next start_range(struct blk_request *request, struct blk_step *step, int *error)
{
    struct blk_progress *progress = &request->progress;

    while (request->range_count > 0) {
        const struct blk_range *range = request->ranges++;

        request->range_count--;
        if (range->length == 0)
            continue;
        progress->offset = range->offset;
        progress->remaining = range->length;
        progress->methods = range_methods(request);
        return range_step(request, step, error);
    }
    if (request->op == BLK_WRITE_ZEROES && request->stable && !request->image->snapshot)
        return sync_step(request, step);
    return done(request, 0, error);
}

static enum blk_next next_range(struct blk_request *request, int64_t result,
                                struct blk_step *step, int *error)
{
    struct blk_progress *progress = &request->progress;
    struct blk_snapshot *snapshot = request->image->snapshot;
    bool writing = *progress->methods == WRITE_ZERO_BYTES;
    uint64_t zeroed = progress->remaining;

    if (result == -EINTR || result == -EAGAIN)
        return range_step(request, step, error);
    if (result == -EOPNOTSUPP && !writing) {
        __atomic_fetch_or(&ranges_image(request)->unsupported, 1u << *progress->methods,
                          __ATOMIC_RELAXED);
        return range_step(request, step, error);
    }
    if (result < 0)
        return done(request, (int)result, error);
    if (writing)
        zeroed = (uint64_t)result;
    if (zeroed == 0)
        return done(request, -EIO, error);
    if (snapshot)
        blk_snapshot_mark(snapshot, progress->offset, progress->offset + zeroed);
    progress->offset += zeroed;
    progress->remaining -= zeroed;
    if (progress->remaining > 0)
        return range_step(request, step, error);
    return start_range(request, step, error);
}

enum blk_next blk_step_first(struct blk_request *request, struct blk_step *step, int *error)
{
    struct blk_progress *progress = &request->progress;

    progress->remaining = 0;
    progress->bounce = NULL;
    progress->shortened = NULL;
    progress->syncing = false;
    switch (request->op) {
    case BLK_READ:
    case BLK_WRITE:
        return first_transfer(request, step, error);
    case BLK_DISCARD:
    case BLK_WRITE_ZEROES:
        return start_range(request, step, error);
    case BLK_FLUSH:
        break;
    }
    if (request->image->snapshot) /* nothing that is thrown away needs to be durable */
        return done(request, 0, error);
    return sync_step(request, step);
}

enum blk_next blk_step_next(struct blk_request *request, int64_t result, struct blk_step *step,
                            int *error)
{
    if (request->progress.syncing) {
        if (result == -EINTR || result == -EAGAIN)
            return sync_step(request, step);
        return done(request, (int)result, error);
    }
    if (request->op == BLK_READ || request->op == BLK_WRITE)
        return next_transfer(request, result, step, error);
    return next_range(request, result, step, error);
}
