/* What a SCSI front end (the HBA that a guest sees) and a logical unit say to each other: commands
 * go in, each comes back exactly once. Words are those of SAM-5 and SPC-4.
 *
 * The front end serves each request queue on a thread of its own, the command's *worker*. A logical
 * unit is used by all workers at once. It ends a command in one of two ways:
 *
 *   scsi_done             on the worker's thread: within `execute`, or from a completion of the
 *                         worker's block engine
 *   scsi_done_elsewhere   on any other thread: the command is handed back to its worker
 *
 * A command that only Python can execute is given to a scsi_handoff, from where the one thread of
 * Python that serves it takes it. C tells Python, and never calls it. */
#ifndef PYVMM_SCSI_H
#define PYVMM_SCSI_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "blk_io.h"

#define SCSI_CDB_MAX 260u   /* the longest that SPC-4 knows */
#define SCSI_SENSE_MAX 252u /* likewise */

/* SAM-5, 5.3.1 */
enum scsi_status {
    SCSI_GOOD = 0x00,
    SCSI_CHECK_CONDITION = 0x02,
    SCSI_CONDITION_MET = 0x04,
    SCSI_BUSY = 0x08,
    SCSI_RESERVATION_CONFLICT = 0x18,
    SCSI_TASK_SET_FULL = 0x28,
    SCSI_TASK_ABORTED = 0x40,
};

/* How the delivery of a command ended; `status` counts only with SCSI_DELIVERED. The numbers are
 * those of virtio 1.2, 5.6.6.1.1. */
enum scsi_delivery {
    SCSI_DELIVERED = 0,
    SCSI_OVERRUN = 1, /* the command needs more data than its buffers hold */
    SCSI_ABORTED = 2,
    SCSI_BAD_TARGET = 3,
    SCSI_RESET = 4,
    SCSI_QUEUE_BUSY = 5,
    SCSI_TRANSPORT_FAILURE = 6,
    SCSI_TARGET_FAILURE = 7,
    SCSI_NEXUS_FAILURE = 8,
    SCSI_FAILURE = 9,
};

/* Sense key, additional sense code and qualifier in one number (SPC-4, 4.5). */
#define SCSI_SENSE(key, asc, ascq) ((uint32_t)(key) << 16 | (uint32_t)(asc) << 8 | (uint32_t)(ascq))

struct scsi_lun;
struct scsi_command;

/* The thread of one request queue, as others see it. */
struct scsi_worker {
    int wake_fd; /* an eventfd that the thread watches */
    pthread_mutex_t lock;
    struct scsi_command *finished; /* atomic: those handed back by scsi_done_elsewhere */
};

/* Buffers in guest memory. They can change at any time: copy first, then decide. */
struct scsi_data {
    struct iovec *iov; /* the logical unit may change the array: it is used up */
    uint32_t count;
    uint32_t bytes;
};

struct scsi_command {
    /* What the front end says. */
    struct scsi_worker *worker;
    struct scsi_lun *lun;
    struct blk_io *io;      /* the worker's engine; only on its thread */
    struct scsi_data out;   /* data-out: to the logical unit. At most one of the two has bytes. */
    struct scsi_data in;    /* data-in: from the logical unit */
    uint32_t cdb_size;      /* bytes sent; those after them are 0 */
    uint8_t cdb[SCSI_CDB_MAX]; /* a copy */

    /* What the logical unit answers. The front end has set all of it to 0. */
    uint8_t delivery;
    uint8_t status;
    uint16_t status_qualifier;
    uint32_t transferred; /* bytes of `out` or `in` that were used */
    uint32_t sense_size;
    uint8_t sense[SCSI_SENSE_MAX];

    /* For the logical unit, between `execute` and done. */
    struct blk_request request;
    void *private_data;
    struct scsi_command *next; /* while nobody else has it in a list: that of a scsi_handoff, say */

    /* The front end's. */
    void (*done)(struct scsi_command *command);
    bool cancelled;
};

struct scsi_lun_ops {
    /* Starts the command, which ends by scsi_done or scsi_done_elsewhere, maybe before this
     * returns. On the worker's thread: must not block. */
    void (*execute)(struct scsi_lun *lun, struct scsi_command *command);

    /* Nobody waits for the result any more: end the command within a second or so, as it likes.
     * It still has to end exactly once, and data must not be touched after that. On the worker's
     * thread, once at most for a command, which may have ended on another one just now. NULL: all
     * commands are short. */
    void (*cancel)(struct scsi_lun *lun, struct scsi_command *command);

    /* A LOGICAL UNIT RESET, I_T nexus reset or power-on (SAM-5, 6.3): settings go back to what was
     * saved, reservations of SPC-2 end. All commands have ended or are about to. Any thread. NULL:
     * there is nothing to do. */
    void (*reset)(struct scsi_lun *lun);
};

/* A page of vital product data, or (code 0xFFFF) the standard INQUIRY data. */
#define SCSI_STANDARD_INQUIRY 0xFFFFu
struct scsi_page {
    uint16_t code;
    uint16_t size;
    const uint8_t *data;
};

#define SCSI_MAX_ATTENTIONS 8

/* A logical unit. Whoever makes one embeds it as the first member of its own structure. */
struct scsi_lun {
    const struct scsi_lun_ops *ops;
    uint64_t id;                   /* Python's, to find its object with */
    const struct scsi_page *pages; /* what scsi_inquiry answers; constant */
    uint32_t page_count;
    uint32_t abilities;            /* see struct scsi_opcode */
    bool descriptor_sense;         /* D_SENSE of the control mode page; atomic */

    pthread_mutex_t lock;          /* for what follows */
    uint32_t attention_count;      /* atomic, so that a look at it needs no lock */
    uint32_t attentions[SCSI_MAX_ATTENTIONS];
};

/* 0 or -errno. `ops` and `pages` must outlive the logical unit. */
int scsi_lun_init(struct scsi_lun *lun, const struct scsi_lun_ops *ops,
                  const struct scsi_page *pages, uint32_t page_count);
void scsi_lun_destroy(struct scsi_lun *lun);

/* Unit attention conditions (SAM-5, 5.14) for the one I_T nexus there is. Any thread. */
#define SCSI_ATTENTION_POWER_ON SCSI_SENSE(0x6, 0x29, 0x00)
#define SCSI_ATTENTION_DEVICE_RESET SCSI_SENSE(0x6, 0x29, 0x03)
#define SCSI_ATTENTION_NEXUS_LOSS SCSI_SENSE(0x6, 0x29, 0x07)
#define SCSI_ATTENTION_MEDIUM_CHANGED SCSI_SENSE(0x6, 0x28, 0x00)
#define SCSI_ATTENTION_CAPACITY_CHANGED SCSI_SENSE(0x6, 0x2A, 0x09)
#define SCSI_ATTENTION_LUNS_CHANGED SCSI_SENSE(0x6, 0x3F, 0x0E)

/* Establishes one, after those that wait; a second of the same kind changes nothing. */
void scsi_attention(struct scsi_lun *lun, uint32_t attention);
/* Resets the logical unit: forgets all of them and establishes this one. */
void scsi_lun_reset(struct scsi_lun *lun, uint32_t attention);
/* The oldest, which is taken away; 0: none. */
uint32_t scsi_attention_take(struct scsi_lun *lun);
/* Takes this one away, if it waits. */
void scsi_attention_drop(struct scsi_lun *lun, uint32_t attention);

/* Executes a command: reports a unit attention condition that is due, else calls `execute`. For
 * front ends, on the worker's thread. */
void scsi_execute(struct scsi_command *command);

/* Ends the command. On its worker's thread. */
void scsi_done(struct scsi_command *command);

/* Ends the command on any other thread; the worker may free it before this returns. */
void scsi_done_elsewhere(struct scsi_command *command);

/* For front ends. 0 or -errno. No command may be in flight when a worker is destroyed. */
int scsi_worker_init(struct scsi_worker *worker, int wake_fd);
void scsi_worker_destroy(struct scsi_worker *worker);
/* The commands handed back since the last call, linked by `next`. On the worker's thread, after
 * each wake-up. */
struct scsi_command *scsi_worker_take(struct scsi_worker *worker);

/* --- answers: these fill in the command, and do not end it --------------------------------- */

/* CHECK CONDITION with sense data in the format that the logical unit is set to. */
void scsi_sense(struct scsi_command *command, uint32_t sense);

/* ILLEGAL REQUEST, INVALID FIELD IN CDB, with a field pointer (SPC-4, 4.5.2.4.2) to `byte` and its
 * `bit`, the leftmost of the field; -1: the byte as a whole. The second is for parameter lists. */
void scsi_invalid_field(struct scsi_command *command, uint32_t byte, int bit);
void scsi_invalid_parameter(struct scsi_command *command, uint32_t byte, int bit);

/* Puts `size` bytes of sense data into `sense` (SCSI_SENSE_MAX bytes) for a REQUEST SENSE, or
 * whatever needs it without a CHECK CONDITION. Returns their number. */
uint32_t scsi_format_sense(uint8_t *sense, uint32_t code, bool descriptor);

/* GOOD, with the first `allocated` of these `size` bytes as data-in. OVERRUN when the buffers do
 * not hold as much. */
void scsi_answer(struct scsi_command *command, const void *data, uint32_t size,
                 uint32_t allocated);

/* Copies a parameter list of `size` bytes out of data-out. When the buffers do not hold as many:
 * false, and OVERRUN is the answer. */
bool scsi_parameters(struct scsi_command *command, void *to, uint32_t size);

/* Cuts the buffers to their first `bytes`. False when they hold less. */
bool scsi_data_trim(struct scsi_data *data, uint32_t bytes);

static inline uint16_t scsi_be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t scsi_be32(const uint8_t *at)
{
    return (uint32_t)scsi_be16(at) << 16 | scsi_be16(at + 2);
}

static inline uint64_t scsi_be64(const uint8_t *at)
{
    return (uint64_t)scsi_be32(at) << 32 | scsi_be32(at + 4);
}

static inline void scsi_put_be16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void scsi_put_be32(uint8_t *at, uint32_t value)
{
    scsi_put_be16(at, (uint16_t)(value >> 16));
    scsi_put_be16(at + 2, (uint16_t)value);
}

static inline void scsi_put_be64(uint8_t *at, uint64_t value)
{
    scsi_put_be32(at, (uint32_t)(value >> 32));
    scsi_put_be32(at + 4, (uint32_t)value);
}

/* --- dispatch: one table says what a logical unit can do ----------------------------------- */

#define SCSI_NO_SERVICE_ACTION 0xFFFFu

/* A command that is implemented. `usage` is its CDB usage data (SPC-4, REPORT SUPPORTED
 * OPERATION CODES): the opcode (and service action), then a 1 for each bit that is evaluated. A CDB
 * with another bit set is refused with INVALID FIELD IN CDB. `needs` are bits that the logical
 * unit's `abilities` must have for the command to exist; what they mean is its own affair. */
struct scsi_opcode {
    uint8_t opcode;
    uint8_t size;            /* of the CDB in bytes, at most 16 */
    uint16_t service_action; /* of those that share the opcode, or SCSI_NO_SERVICE_ACTION */
    uint8_t usage[16];
    void (*execute)(struct scsi_lun *lun, struct scsi_command *command);
    uint32_t needs;
};

/* Sorted by opcode and service action. */
struct scsi_opcodes {
    const struct scsi_opcode *table;
    uint32_t count;
};

/* The entry for a CDB after its checks; NULL: the command has been answered with a CHECK CONDITION
 * (INVALID COMMAND OPERATION CODE or INVALID FIELD IN CDB). */
const struct scsi_opcode *scsi_find(const struct scsi_opcodes *opcodes, uint32_t abilities,
                                    struct scsi_command *command);

/* Executes the command, or ends it with the sense data of what is wrong with its CDB. */
void scsi_execute_from(const struct scsi_opcodes *opcodes, struct scsi_lun *lun,
                       struct scsi_command *command);

/* INQUIRY (SPC-4, 6.6), answered from the pages of the logical unit; it is also done. */
void scsi_inquiry(struct scsi_lun *lun, struct scsi_command *command);

/* --- commands for Python -------------------------------------------------------------------- */

struct scsi_handoff;

/* NULL with errno set on failure. */
struct scsi_handoff *scsi_handoff_create(void);
/* Nobody may give, and the thread of Python must have ended. */
void scsi_handoff_destroy(struct scsi_handoff *handoff);

/* Gives Python a command to end by scsi_done_elsewhere. Any thread. */
void scsi_handoff_give(struct scsi_handoff *handoff, struct scsi_command *command);

/* Waits for the next command; NULL after scsi_handoff_stop, when there is none left. */
struct scsi_command *scsi_handoff_take(struct scsi_handoff *handoff);
void scsi_handoff_stop(struct scsi_handoff *handoff);

#endif
