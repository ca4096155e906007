/* How the steps of a request are done on an image that another process serves: what stands between
 * blk_io and the client of a protocol, which may live in an extension module of its own. */
#ifndef PYVMM_BLK_REMOTE_H
#define PYVMM_BLK_REMOTE_H

#include "blk_io.h"
#include "blk_step.h"

/* A thread's way to a server. One thread at a time uses it. */
struct blk_link {
    struct blk_remote *remote;
    struct blk_link *next; /* blk_io's */
    struct blk_io *io;
    /* To be called, within `service`, once for each step that `start` left under way. */
    void (*done)(struct blk_io *io, struct blk_request *request, int64_t result);
    bool ready; /* `service` has something to do, whatever `epoll_fd` says */
    bool gone;  /* the image was closed, with nothing under way: `detach` is due */
};

struct blk_remote {
    /* Never waits. `epoll_fd` gets what `service` has to wait for. NULL with errno on failure. */
    struct blk_link *(*attach)(struct blk_remote *remote, int epoll_fd);
    /* No step may be under way, unless the engine failed. */
    void (*detach)(struct blk_link *link);
    /* Starts a step. True if it is done already, with its result (see blk_step_next). */
    bool (*start)(struct blk_link *link, struct blk_request *request, const struct blk_step *step,
                  int64_t *result);
    /* Does all that can be done without waiting. */
    void (*service)(struct blk_link *link);
};

#endif
