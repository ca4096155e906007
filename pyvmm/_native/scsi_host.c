#include "scsi_host.h"

#include <errno.h>
#include <fcntl.h>
#include <scsi/scsi.h>
#include <scsi/sg.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* Of Linux; the C library's scsi/sg.h lacks them. */
#ifndef SG_SCSI_RESET_NO_ESCALATE
#define SG_SCSI_RESET_NO_ESCALATE 0x100
#endif
#ifndef SG_MAX_CDB_SIZE
#define SG_MAX_CDB_SIZE 252
#endif

/* Buffers that are larger than this are not kept. */
#define KEPT_BYTES (1u << 20)
#define BUFFER_ALIGN 4096u
#define STACK_BYTES (128u << 10)
/* For the host to end cancelled commands, before the device is reset. */
#define PATIENCE_SECONDS 1
#define QUERY_MILLISECONDS 10000u

/* A command at the host, and the thread that waits for it. */
struct task {
    struct pool *pool;
    struct scsi_command *command;
    bool touching;  /* its buffers in guest memory: it cannot be cancelled now */
    bool orphan;    /* the command has been cancelled, and has ended without the host */
    bool cancelled; /* the command has been cancelled, and ends with the host */
    uint8_t *buffer;
    uint32_t buffer_size;
};

/* What the threads share. It lives until the last of them has ended. */
struct pool {
    int fd;
    struct scsi_pass_limits limits;
    pthread_mutex_t lock; /* for all that follows */
    pthread_cond_t wake;    /* something to do */
    pthread_cond_t settled; /* a task touches its buffers no more */
    uint32_t references; /* threads, and the logical unit */
    bool stopping;
    bool giving_up; /* there is a thread in give_up */
    bool resetting; /* no command starts meanwhile */
    uint32_t held;  /* cancelled commands that the host has not ended */
    uint32_t idle;
    uint32_t waiting; /* commands that no thread has taken yet: first and those after it */
    uint32_t threads;
    struct task tasks[SCSI_HOST_THREADS];
    struct scsi_command *first, **last;
    struct scsi_host_counters counters;
};

struct scsi_host {
    struct scsi_lun lun; /* first */
    struct pool *pool;
};

static struct pool *pool_of(struct scsi_lun *lun)
{
    return ((struct scsi_host *)lun)->pool;
}

/* --- data --------------------------------------------------------------------------------- */

static bool reserve(struct task *task, uint32_t size)
{
    void *buffer;

    if (size <= task->buffer_size)
        return true;
    size = (size + BUFFER_ALIGN - 1) & ~(BUFFER_ALIGN - 1);
    if (posix_memalign(&buffer, BUFFER_ALIGN, size) != 0)
        return false;
    free(task->buffer);
    task->buffer = buffer;
    task->buffer_size = size;
    memset(buffer, 0, size); /* whatever a device leaves unwritten, the guest finds nothing in it */
    return true;
}

static void release_large(struct task *task)
{
    if (task->buffer_size <= KEPT_BYTES)
        return;
    free(task->buffer);
    task->buffer = NULL;
    task->buffer_size = 0;
}

/* --- one command ---------------------------------------------------------------------------- */

/* What goes to the host: a copy, for the command may end before the host is done with it. */
struct request {
    struct sg_io_hdr header;
    uint8_t cdb[SCSI_CDB_MAX];
    uint8_t sense[SCSI_SENSE_MAX];
    uint32_t size; /* of the data */
};

static void prepare(struct request *request, const struct scsi_command *command, uint8_t *buffer)
{
    uint32_t cdb_size = scsi_pass_cdb_size(command->cdb);

    memcpy(request->cdb, command->cdb, sizeof(request->cdb));
    request->size = command->out.bytes + command->in.bytes; /* one of them is 0 */
    if (command->out.bytes > 0)
        scsi_pass_gather(&command->out, buffer);
    request->header = (struct sg_io_hdr){
        .interface_id = 'S',
        .dxfer_direction = command->out.bytes > 0  ? SG_DXFER_TO_DEV
                           : command->in.bytes > 0 ? SG_DXFER_FROM_DEV
                                                   : SG_DXFER_NONE,
        .cmd_len = (unsigned char)cdb_size,
        .mx_sb_len = sizeof(request->sense),
        .dxfer_len = request->size,
        .dxferp = request->size > 0 ? buffer : NULL,
        .cmdp = request->cdb,
        .sbp = request->sense,
        .timeout = scsi_pass_timeout(request->cdb) * 1000,
    };
}

/* Of the kernel's host_status (Linux, include/scsi/scsi_status.h). */
static enum scsi_delivery delivery_of(uint32_t host_status)
{
    switch (host_status) {
    case 0x01: /* DID_NO_CONNECT */
    case 0x04: /* DID_BAD_TARGET */
        return SCSI_BAD_TARGET;
    case 0x02: /* DID_BUS_BUSY */
    case 0x0C: /* DID_IMM_RETRY */
    case 0x0D: /* DID_REQUEUE */
        return SCSI_QUEUE_BUSY;
    case 0x05: /* DID_ABORT */
        return SCSI_ABORTED;
    case 0x08: /* DID_RESET */
        return SCSI_RESET;
    case 0x03: /* DID_TIME_OUT: drivers try again, which they do not after an abort */
    case 0x0E: /* DID_TRANSPORT_DISRUPTED */
    case 0x0F: /* DID_TRANSPORT_FAILFAST */
    case 0x14: /* DID_TRANSPORT_MARGINAL */
        return SCSI_TRANSPORT_FAILURE;
    }
    return SCSI_FAILURE;
}

/* The answer to a command that the host's kernel did not accept. */
static void answer_error(struct scsi_command *command, int error)
{
    switch (error) {
    case EPERM:
    case EACCES:
        scsi_sense(command, SCSI_SENSE(0x5, 0x20, 0x00)); /* INVALID COMMAND OPERATION CODE */
        break;
    case EINVAL: /* the transfer, or the CDB, is longer than the host can do */
    case EMSGSIZE:
    case E2BIG:
        scsi_sense(command, SCSI_SENSE(0x5, 0x24, 0x00)); /* INVALID FIELD IN CDB */
        break;
    case ENODEV:
    case ENXIO:
        command->delivery = SCSI_BAD_TARGET;
        break;
    case EDOM: /* too many commands at once for a /dev/sgN */
    case EAGAIN:
    case EBUSY:
    case ENOMEM:
        command->delivery = SCSI_QUEUE_BUSY;
        break;
    default:
        command->delivery = SCSI_FAILURE;
    }
}

static void answer(struct pool *pool, struct request *request, struct scsi_command *command,
                   uint8_t *buffer, int error)
{
    const struct sg_io_hdr *header = &request->header;
    uint32_t moved = request->size;

    if (error) {
        answer_error(command, error);
        return;
    }
    /* Some failures that the kernel names in host_status are its reading of a status. */
    if (header->status == 0 && header->host_status != 0) {
        command->delivery = (uint8_t)delivery_of(header->host_status);
        return;
    }
    command->status = header->status;
    if (header->resid > 0)
        moved -= (uint32_t)header->resid < moved ? (uint32_t)header->resid : moved;
    command->transferred = moved;
    command->sense_size = header->sb_len_wr;
    memcpy(command->sense, request->sense, header->sb_len_wr);
    if (command->in.bytes > 0) {
        if (header->status == 0)
            scsi_pass_patch(&pool->limits, request->cdb, buffer, moved);
        scsi_pass_scatter(buffer, moved, &command->in);
    }
}

static void touch(struct pool *pool, struct task *task)
{
    task->touching = true;
    pthread_mutex_unlock(&pool->lock);
}

static void settle(struct pool *pool, struct task *task)
{
    pthread_mutex_lock(&pool->lock);
    task->touching = false;
    pthread_cond_broadcast(&pool->settled);
}

/* Ends the task's command. With the lock taken, as the next one, but for what takes time. */
static void end(struct pool *pool, struct task *task)
{
    struct scsi_command *command = task->command;

    task->command = NULL;
    pool->counters.commands++;
    pthread_mutex_unlock(&pool->lock);
    scsi_done_elsewhere(command);
    pthread_mutex_lock(&pool->lock);
}

/* Executes the task's command. */
static void perform(struct pool *pool, struct task *task)
{
    struct scsi_command *command = task->command;
    struct request request;
    bool room;
    int error;

    touch(pool, task);
    room = reserve(task, command->out.bytes + command->in.bytes);
    if (room)
        prepare(&request, command, task->buffer);
    else
        command->delivery = SCSI_QUEUE_BUSY;
    settle(pool, task);
    if (!room) {
        end(pool, task);
        return;
    }
    pthread_mutex_unlock(&pool->lock);
    error = ioctl(pool->fd, SG_IO, &request.header) < 0 ? errno : 0;
    pthread_mutex_lock(&pool->lock);
    if (task->orphan || task->cancelled) {
        pool->held--;
        pthread_cond_broadcast(&pool->settled);
    }
    if (task->cancelled) {
        command->delivery = SCSI_ABORTED;
        end(pool, task);
    } else if (!task->orphan) {
        touch(pool, task);
        answer(pool, &request, command, task->buffer, error);
        settle(pool, task);
        end(pool, task);
    }
    task->orphan = task->cancelled = false;
    release_large(task);
}

/* --- the threads ---------------------------------------------------------------------------- */

/* Gives up one reference and the lock. */
static void pool_put(struct pool *pool)
{
    bool last = --pool->references == 0;

    pthread_mutex_unlock(&pool->lock);
    if (!last)
        return;
    for (uint32_t i = 0; i < SCSI_HOST_THREADS; i++)
        free(pool->tasks[i].buffer);
    pthread_cond_destroy(&pool->settled);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    close(pool->fd);
    free(pool);
}

/* Takes the command out of what waits for a thread: whether it was there. */
static bool unqueue(struct pool *pool, struct scsi_command *command)
{
    for (struct scsi_command **at = &pool->first; *at; at = &(*at)->next)
        if (*at == command) {
            *at = command->next;
            if (!*at)
                pool->last = at;
            pool->waiting--;
            return true;
        }
    return false;
}

static void *serve(void *argument)
{
    struct task *task = argument;
    struct pool *pool = task->pool;

    pthread_mutex_lock(&pool->lock);
    for (;;) {
        struct scsi_command *command = pool->first;

        if (command && !pool->resetting) {
            unqueue(pool, command);
            task->command = command;
            perform(pool, task);
            continue;
        }
        if (pool->stopping)
            break;
        pool->idle++;
        pthread_cond_wait(&pool->wake, &pool->lock);
        pool->idle--;
    }
    pool_put(pool);
    return NULL;
}

/* Waits for cancelled commands to end, and then has the device forget what it holds for us. Without
 * the rights for that (CAP_SYS_ADMIN and CAP_SYS_RAWIO), time alone has to do it. */
static void *give_up(void *argument)
{
    struct pool *pool = argument;
    int how = SG_SCSI_RESET_DEVICE | SG_SCSI_RESET_NO_ESCALATE;
    struct timespec deadline;
    bool patient = true;

    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += PATIENCE_SECONDS;
    pthread_mutex_lock(&pool->lock);
    while (pool->held > 0 && patient)
        patient = pthread_cond_timedwait(&pool->settled, &pool->lock, &deadline) == 0;
    if (pool->held > 0) {
        pool->resetting = true;
        pthread_mutex_unlock(&pool->lock);
        (void)ioctl(pool->fd, SG_SCSI_RESET, &how);
        pthread_mutex_lock(&pool->lock);
        pool->counters.resets++;
        pool->resetting = false;
        pthread_cond_broadcast(&pool->wake);
    }
    pool->giving_up = false;
    pool_put(pool);
    return NULL;
}

/* A thread for the pool, which has a reference to it: 0 or an errno. With the lock taken. */
static int start_thread(struct pool *pool, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_t thread;
    int error;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for others */
    error = pthread_create(&thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (error == 0) {
        pthread_setname_np(thread, "scsi-host");
        pool->references++;
    }
    return error;
}

/* --- what the front end calls --------------------------------------------------------------- */

static void execute(struct scsi_lun *lun, struct scsi_command *command)
{
    struct pool *pool = pool_of(lun);
    bool taken = true;

    if (scsi_pass_refuses(command)) {
        scsi_done(command);
        return;
    }
    if (command->out.bytes > SCSI_PASS_MAX_BYTES || command->in.bytes > SCSI_PASS_MAX_BYTES ||
        scsi_pass_cdb_size(command->cdb) > SG_MAX_CDB_SIZE) {
        scsi_sense(command, SCSI_SENSE(0x5, 0x24, 0x00)); /* INVALID FIELD IN CDB */
        scsi_done(command);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    if (pool->idle <= pool->waiting && pool->threads < SCSI_HOST_THREADS) {
        struct task *task = &pool->tasks[pool->threads];

        if (start_thread(pool, serve, task) == 0)
            pool->threads++;
        else
            taken = pool->threads > 0;
    }
    if (taken) {
        command->next = NULL;
        *pool->last = command;
        pool->last = &command->next;
        pool->waiting++;
        pthread_cond_signal(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);
    if (!taken) {
        command->delivery = SCSI_QUEUE_BUSY;
        scsi_done(command);
    }
}

static void start_giving_up(struct pool *pool)
{
    if (pool->held > 0 && !pool->giving_up)
        pool->giving_up = start_thread(pool, give_up, pool) == 0;
}

/* The task that has the command at the host; NULL: none has, any more. */
static struct task *find_task(struct pool *pool, struct scsi_command *command)
{
    for (uint32_t i = 0; i < pool->threads; i++) {
        struct task *task = &pool->tasks[i];

        while (task->command == command && task->touching)
            pthread_cond_wait(&pool->settled, &pool->lock);
        if (task->command == command)
            return task;
    }
    return NULL;
}

/* Cancels a command that has begun: whether it ends here. One that brings data cannot do harm when
 * it is executed later. Any other must have ended at the host before it ends here, or else it might
 * overwrite what comes after it. */
static bool cancel_at_host(struct pool *pool, struct scsi_command *command)
{
    struct task *task = find_task(pool, command);

    if (!task)
        return false;
    pool->counters.cancelled++;
    pool->held++;
    if (command->in.bytes > 0) {
        task->command = NULL;
        task->orphan = true;
        return true;
    }
    task->cancelled = true;
    start_giving_up(pool);
    return false;
}

static void cancel(struct scsi_lun *lun, struct scsi_command *command)
{
    struct pool *pool = pool_of(lun);
    bool ends;

    pthread_mutex_lock(&pool->lock);
    ends = unqueue(pool, command) || cancel_at_host(pool, command);
    if (ends)
        pool->counters.commands++;
    pthread_mutex_unlock(&pool->lock);
    if (ends) {
        command->delivery = SCSI_ABORTED;
        scsi_done(command);
    }
}

/* A device that holds nothing of ours has nothing to abort, and others may be using it. */
static void reset(struct scsi_lun *lun)
{
    struct pool *pool = pool_of(lun);

    pthread_mutex_lock(&pool->lock);
    start_giving_up(pool);
    pthread_mutex_unlock(&pool->lock);
}

static const struct scsi_lun_ops host_ops = {
    .execute = execute,
    .cancel = cancel,
    .reset = reset,
};

/* --- create and destroy --------------------------------------------------------------------- */

struct scsi_host *scsi_host_create(int fd, const struct scsi_pass_limits *limits)
{
    struct scsi_host *host = calloc(1, sizeof(*host));
    struct pool *pool = calloc(1, sizeof(*pool));
    int error = ENOMEM;

    if (!host || !pool)
        goto failed;
    error = -scsi_lun_init(&host->lun, &host_ops, NULL, 0);
    if (error)
        goto failed;
    pool->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (pool->fd < 0) {
        error = errno;
        scsi_lun_destroy(&host->lun);
        goto failed;
    }
    pool->limits = *limits;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->settled, NULL);
    pool->references = 1;
    pool->last = &pool->first;
    for (uint32_t i = 0; i < SCSI_HOST_THREADS; i++)
        pool->tasks[i].pool = pool;
    host->pool = pool;
    return host;

failed:
    free(pool);
    free(host);
    errno = error;
    return NULL;
}

void scsi_host_destroy(struct scsi_host *host)
{
    if (!host)
        return;
    pthread_mutex_lock(&host->pool->lock);
    host->pool->stopping = true;
    pthread_cond_broadcast(&host->pool->wake);
    pool_put(host->pool);
    scsi_lun_destroy(&host->lun);
    free(host);
}

struct scsi_lun *scsi_host_lun(struct scsi_host *host)
{
    return &host->lun;
}

struct scsi_host_counters scsi_host_counters(struct scsi_host *host)
{
    struct scsi_host_counters counters;

    pthread_mutex_lock(&host->pool->lock);
    counters = host->pool->counters;
    counters.held = host->pool->held;
    pthread_mutex_unlock(&host->pool->lock);
    return counters;
}

int scsi_host_query(int fd, const uint8_t *cdb, uint32_t cdb_size, void *data, uint32_t size)
{
    uint8_t sense[SCSI_SENSE_MAX];
    struct sg_io_hdr header = {
        .interface_id = 'S',
        .dxfer_direction = size > 0 ? SG_DXFER_FROM_DEV : SG_DXFER_NONE,
        .cmd_len = (unsigned char)cdb_size,
        .mx_sb_len = sizeof(sense),
        .dxfer_len = size,
        .dxferp = data,
        .cmdp = (unsigned char *)cdb,
        .sbp = sense,
        .timeout = QUERY_MILLISECONDS,
    };

    if (ioctl(fd, SG_IO, &header) < 0)
        return -errno;
    if (header.status != 0 || header.host_status != 0)
        return -EIO;
    return (int)size - header.resid;
}
