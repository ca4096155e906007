/* A logical unit that is a SCSI device of the host, reached by SG_IO: commands, data, status and
 * sense pass as they are, but for what scsi_pass.h says.
 *
 * SG_IO blocks, so each logical unit has threads for it, started when they are needed.
 *
 * The host's kernel cannot be asked to forget a command that it has begun. So data goes through
 * buffers of the threads: one that only brings data is cancelled at once, and no guest memory is
 * touched after that. Any other ends when the host has ended it, which a reset of the device
 * hastens. */
#ifndef PYVMM_SCSI_HOST_H
#define PYVMM_SCSI_HOST_H

#include "scsi_pass.h"

/* As many as one open /dev/sgN takes (SG_MAX_QUEUE). */
#define SCSI_HOST_THREADS 16u

struct scsi_host;

struct scsi_host_counters {
    uint64_t commands;  /* that ended */
    uint64_t cancelled; /* after the host had begun them */
    uint64_t resets;    /* of the device, for those that did not end then */
    uint64_t held;      /* cancelled ones that the host has not ended yet */
};

/* `fd` is a block device of SCSI or a /dev/sgN; it is duplicated. NULL with errno set on failure. */
struct scsi_host *scsi_host_create(int fd, const struct scsi_pass_limits *limits);

/* All commands have ended. The host may still hold cancelled ones, and cannot delay this. */
void scsi_host_destroy(struct scsi_host *host);

struct scsi_lun *scsi_host_lun(struct scsi_host *host);

/* Any thread. */
struct scsi_host_counters scsi_host_counters(struct scsi_host *host);

/* One command without data-out, for who opens a device: `data` gets its data-in, which is `size`
 * bytes at most. The number of bytes; -errno, or -EIO where the status is not GOOD. Blocks for
 * some seconds at most. */
int scsi_host_query(int fd, const uint8_t *cdb, uint32_t cdb_size, void *data, uint32_t size);

#endif
