/* The block device's queues: requests of virtio 1.2, section 5.2.6, served through blk_io. */
#ifndef PYVMM_VIRTIO_BLK_H
#define PYVMM_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_io.h"
#include "guest_mem.h"
#include "virtio_irq.h"
#include "virtq.h"

#define VIRTIO_BLK_SECTOR 512u

/* Limits of one DISCARD or WRITE_ZEROES request, as the configuration space tells them. */
#define VIRTIO_BLK_MAX_SEGMENTS 32u
#define VIRTIO_BLK_MAX_SEGMENT_SECTORS (1u << 22) /* 2 GiB */

/* What all queues of a device share. It outlives them; only `writethrough` changes meanwhile. */
struct virtio_blk_device {
    struct blk_image *image;
    bool readonly;
    bool stop_on_error; /* errors of the host end virtio_blk_queue_run instead of the request */
    uint8_t serial[20]; /* padded with NUL */
    bool writethrough;  /* see virtio_blk_set_writethrough */
};

struct virtio_blk_counters {
    uint64_t requests;   /* completed, whatever their status */
    uint64_t failed;     /* of these, with a status other than OK */
    uint64_t interrupts;
    uint64_t malformed;  /* chains that the ring returned or dropped by itself */
};

enum virtio_blk_result {
    VIRTIO_BLK_STOPPED, /* by virtio_blk_queue_stop; virtio_blk_queue_run may be called again */
    VIRTIO_BLK_BROKEN,  /* the ring can no longer be followed */
    VIRTIO_BLK_FAILED,  /* an error of the host: virtio_blk_queue_error; may be called again, too */
    /* or -errno: the engine cannot go on */
};

struct virtio_blk_queue;

/* Whether writes that start from now on are on stable storage when they are complete. */
void virtio_blk_set_writethrough(struct virtio_blk_device *device, bool writethrough);

/* A queue that the driver configured. `kick_fd` is the eventfd of its notifications; `memory`,
 * `irq` and `device` must outlive the queue. NULL with errno set on failure: EINVAL when
 * virtq_init refuses `config`. */
struct virtio_blk_queue *virtio_blk_queue_create(struct virtio_blk_device *device,
                                                 enum blk_engine engine,
                                                 const struct guest_mem *memory,
                                                 const struct virtq_config *config, int kick_fd,
                                                 struct virtio_irq *irq);
void virtio_blk_queue_destroy(struct virtio_blk_queue *queue);

/* Serves the queue until it is stopped or broken: an enum virtio_blk_result or -errno. On return
 * no request is in flight, and guest memory is not touched any more. Requests that failed with
 * `stop_on_error`, or that a limit held, are kept and begin the next run. */
int virtio_blk_queue_run(struct virtio_blk_queue *queue);

/* The error that ended the last run, for VIRTIO_BLK_FAILED: an errno. */
int virtio_blk_queue_error(const struct virtio_blk_queue *queue);

/* Has the queue look at the limits of its image, which have changed. Any thread. */
void virtio_blk_queue_wake(struct virtio_blk_queue *queue);

/* Makes virtio_blk_queue_run return; one that has not started yet, after a look at the ring. Any
 * thread. */
void virtio_blk_queue_stop(struct virtio_blk_queue *queue);

/* Takes a stop back that came too late, after the end of a run. */
void virtio_blk_queue_allow(struct virtio_blk_queue *queue);

/* Any thread. */
struct virtio_blk_counters virtio_blk_queue_counters(const struct virtio_blk_queue *queue);

#endif
