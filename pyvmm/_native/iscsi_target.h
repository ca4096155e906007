/* A logical unit of an iSCSI target, reached over the network by libiscsi: commands, data, status and
 * sense pass as they are, but for what scsi_pass.h says.
 *
 * One thread keeps the session. While there is none, commands wait for it up to a limit that is
 * shorter than a driver's patience, and then fail. Those that were under way when a connection broke
 * fail at once, as only the driver knows which of them can be repeated. Data goes through buffers
 * here, so that a command can end before the library is done with it. */
#ifndef PYVMM_ISCSI_TARGET_H
#define PYVMM_ISCSI_TARGET_H

#include "scsi_pass.h"

/* Strings are copied; `user` and `password` may be empty. */
struct iscsi_target_config {
    const char *portal; /* address:port */
    const char *target; /* its IQN */
    const char *initiator;
    const char *user;
    const char *password;
    uint32_t lun;          /* at most 16383 */
    uint32_t wait_seconds; /* for a connection, of a command */
    uint32_t ping_seconds; /* between two questions whether the connection lives */
};

struct iscsi_target_counters {
    uint64_t commands; /* that ended */
    uint64_t sessions; /* that were established */
    uint64_t failed;   /* commands that failed because there was no connection */
    bool connected;
};

struct iscsi_target;

/* NULL with errno set on failure. */
struct iscsi_target *iscsi_target_create(const struct iscsi_target_config *config);

/* All commands have ended, and iscsi_target_run has returned. */
void iscsi_target_destroy(struct iscsi_target *target);

struct scsi_lun *iscsi_target_lun(struct iscsi_target *target);

/* Establishes the first session, within `seconds`. 0; or a negative number, with the library's words
 * in `error`, of `size` bytes. Before iscsi_target_run, as the next two. */
int iscsi_target_connect(struct iscsi_target *target, uint32_t seconds, char *error,
                         uint32_t size);

/* One command without data-out: see scsi_host_query. */
int iscsi_target_query(struct iscsi_target *target, const uint8_t *cdb, uint32_t cdb_size,
                       void *data, uint32_t size);

void iscsi_target_set_limits(struct iscsi_target *target, const struct scsi_pass_limits *limits);

/* Serves the logical unit until iscsi_target_stop; then the session is ended. 0 or -errno. */
int iscsi_target_run(struct iscsi_target *target);

/* Makes iscsi_target_run return, also one that has not started yet. Any thread. */
void iscsi_target_stop(struct iscsi_target *target);

/* Any thread. */
struct iscsi_target_counters iscsi_target_counters(struct iscsi_target *target);

#endif
