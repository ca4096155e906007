/* The steps of a block request: what to ask the kernel next, whichever way it is asked. */
#ifndef PYVMM_BLK_STEP_H
#define PYVMM_BLK_STEP_H

#include "blk_io.h"

enum blk_step_kind {
    BLK_STEP_READ,     /* preadv2(iov) at offset */
    BLK_STEP_WRITE,    /* pwritev2(iov) at offset, RWF_DSYNC if `stable` */
    BLK_STEP_SYNC,     /* fdatasync */
    BLK_STEP_ALLOCATE, /* fallocate(mode, offset, length) */
    BLK_STEP_DISCARD,  /* BLKDISCARD(offset, length) */
};

struct blk_step {
    struct blk_image *image; /* that of the request, or what lies below it */
    enum blk_step_kind kind;
    bool stable;
    int mode;
    uint64_t offset;
    uint64_t length;
    const struct iovec *iov;
    uint32_t iov_count;
};

enum blk_next {
    BLK_STEP, /* `step` is to be done, then blk_step_next called with its result */
    BLK_DONE, /* `error` is the outcome */
};

/* The first step of a request. `error` is set with BLK_DONE. */
enum blk_next blk_step_first(struct blk_request *request, struct blk_step *step, int *error);

/* The step after one that returned `result`: bytes transferred, 0, or -errno. */
enum blk_next blk_step_next(struct blk_request *request, int64_t result, struct blk_step *step,
                            int *error);

#endif
