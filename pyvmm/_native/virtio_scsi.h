/* The SCSI host device's request queues (virtio 1.2, 5.6.6.1): commands, each for the logical unit
 * that it names. What a logical unit is, is in scsi.h. */
#ifndef PYVMM_VIRTIO_SCSI_H
#define PYVMM_VIRTIO_SCSI_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_io.h"
#include "guest_mem.h"
#include "scsi.h"
#include "virtio_irq.h"
#include "virtq.h"

#define VIRTIO_SCSI_MAX_TARGET 255u
#define VIRTIO_SCSI_MAX_LUN 16383u
#define VIRTIO_SCSI_MAX_QUEUES 16u

/* The logical units behind a device, sorted by address: target << 16 | LUN. Constant. */
struct virtio_scsi_unit {
    uint32_t address;
    struct scsi_lun *lun;
};
struct virtio_scsi_map {
    uint32_t count;
    const struct virtio_scsi_unit *units;
};

/* What an address of the driver (5.6.6.1) stands for. */
enum virtio_scsi_place {
    VIRTIO_SCSI_UNIT,         /* `lun` */
    VIRTIO_SCSI_NO_UNIT,      /* there is none, at a target that exists */
    VIRTIO_SCSI_NO_TARGET,
    VIRTIO_SCSI_WELL_KNOWN,   /* REPORT LUNS of the target */
    VIRTIO_SCSI_ALL_TARGETS,  /* REPORT LUNS of the device */
};
struct virtio_scsi_found {
    enum virtio_scsi_place place;
    uint32_t address;
    struct scsi_lun *lun;
};
struct virtio_scsi_found virtio_scsi_find(const struct virtio_scsi_map *map,
                                          const uint8_t lun[8]);

struct virtio_scsi_queue;

/* Something that concerns all queues: a new map, and commands to be found or to be ended. The first
 * members are the caller's, who keeps it, and may not touch it otherwise, until `pending` is 0,
 * which `done_fd` is signalled for. */
struct virtio_scsi_function {
    const struct virtio_scsi_map *map; /* what the queues use from now on; NULL: no change */

    /* The commands meant are those to `lun` or, if that is NULL, to `target`; with `one`, only
     * that with the `tag`. With an `end` other than SCSI_DELIVERED they are ended that way. */
    struct scsi_lun *lun;
    int32_t target; /* -1: none, and with no `lun` no command is meant */
    bool one;
    uint64_t tag;
    uint8_t end;    /* enum scsi_delivery */
    int done_fd;    /* an eventfd, or -1; outlives the function */

    uint32_t matched; /* atomic: commands that there were */
    uint32_t pending; /* atomic: queues that have not done it */

    struct virtio_scsi_part {
        struct virtio_scsi_function *function;
        struct virtio_scsi_part *next;
        uint64_t before; /* commands that started earlier are meant */
        uint32_t left;   /* of these, not yet ended */
    } parts[VIRTIO_SCSI_MAX_QUEUES];
};

/* Hands the function to the queues, `count` of them. It may be done on return. Any thread. */
void virtio_scsi_post(struct virtio_scsi_function *function,
                      struct virtio_scsi_queue *const *queues, uint32_t count);

struct virtio_scsi_counters {
    uint64_t requests;   /* completed, whatever their response */
    uint64_t failed;     /* of these, without status GOOD */
    uint64_t interrupts;
    uint64_t malformed;  /* chains that the ring returned or dropped by itself */
};

enum virtio_scsi_result {
    VIRTIO_SCSI_STOPPED, /* by virtio_scsi_queue_stop; virtio_scsi_queue_run may be called again */
    VIRTIO_SCSI_BROKEN,  /* the ring can no longer be followed */
    /* or -errno: the engine cannot go on */
};

/* The sizes that the driver chose in the configuration space (5.6.4). */
struct virtio_scsi_sizes {
    uint32_t sense_size; /* at most SCSI_SENSE_MAX */
    uint32_t cdb_size;   /* 1 to SCSI_CDB_MAX */
};

/* A request queue that the driver configured. `kick_fd` is the eventfd of its notifications;
 * `memory`, `irq` and the maps it is given must outlive the queue. NULL with errno set on failure:
 * EINVAL when virtq_init refuses `config`. */
struct virtio_scsi_queue *virtio_scsi_queue_create(const struct virtio_scsi_map *map,
                                                   const struct virtio_scsi_sizes *sizes,
                                                   enum blk_engine engine,
                                                   const struct guest_mem *memory,
                                                   const struct virtq_config *config, int kick_fd,
                                                   struct virtio_irq *irq);
void virtio_scsi_queue_destroy(struct virtio_scsi_queue *queue);

/* Serves the queue until it is stopped or broken: an enum virtio_scsi_result or -errno. On return
 * no command is in flight, and guest memory is not touched any more. */
int virtio_scsi_queue_run(struct virtio_scsi_queue *queue);

/* Makes virtio_scsi_queue_run return; one that has not started yet, after a look at the ring. With
 * `cancel`, commands that are in flight are to end soon instead of well. Any thread. */
void virtio_scsi_queue_stop(struct virtio_scsi_queue *queue, bool cancel);

/* Has the queue look at limits of images that have changed. Any thread. */
void virtio_scsi_queue_wake(struct virtio_scsi_queue *queue);

/* Any thread. */
struct virtio_scsi_counters virtio_scsi_queue_counters(const struct virtio_scsi_queue *queue);

#endif
