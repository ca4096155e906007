#include "iscsi_target.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

/* The library has types by these names, too. */
#define scsi_status library_scsi_status
#define scsi_data library_scsi_data
#define scsi_opcode library_scsi_opcode
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>
#undef scsi_status
#undef scsi_data
#undef scsi_opcode

#define CDB_MAX 16u /* the library's */
#define LOGIN_SECONDS 10
#define RETRY_SECONDS 1
#define QUERY_SECONDS 10
/* A connection is given up when as many pings have no answer. */
#define PINGS_MAX 3
#define ABORT_SECONDS 5
#define LOGOUT_SECONDS 1
#define TICK_MILLISECONDS 500

/* A command on its way. */
struct request {
    struct request *next;
    struct iscsi_target *target;
    struct scsi_command *command; /* NULL: it has ended already */
    bool cancelled;               /* ends when the target has forgotten it, whatever it says */
    struct scsi_task *task;       /* NULL: the library does not have it */
    int64_t deadline;             /* while it waits for a connection */
    uint8_t cdb[CDB_MAX];
    uint32_t cdb_size;
    uint32_t out_size, in_size; /* one of them is 0 */
    uint8_t data[];
};

struct list {
    struct request *first, **last;
};

enum session { NO_SESSION, CONNECTING, LOGGED_IN, FAILED };

struct iscsi_target {
    struct scsi_lun lun; /* first */
    char *portal, *name, *initiator, *user, *password;
    int address; /* of the logical unit, as the library wants it */
    uint32_t session_id;
    uint32_t wait_seconds, ping_seconds;
    struct scsi_pass_limits limits;
    int wake_fd;

    pthread_mutex_t lock; /* for what follows */
    bool stopping;
    bool resetting;
    struct list waiting; /* for a session */
    struct list sent;
    struct iscsi_target_counters counters;

    /* The thread's alone. */
    struct iscsi_context *context;
    enum session session;
    bool lost; /* the session is to be given up, as soon as the library is left */
    bool logging_out;
    char redirected[256]; /* another portal, for the next attempt */
    int64_t next_attempt, login_deadline, next_ping, abort_deadline;
    struct request *aborting; /* the one that the target was asked to forget */
    char error[256];
};

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
}

static void append(struct list *list, struct request *request)
{
    request->next = NULL;
    *list->last = request;
    list->last = &request->next;
}

static bool take_out(struct list *list, struct request *request)
{
    for (struct request **at = &list->first; *at; at = &(*at)->next)
        if (*at == request) {
            *at = request->next;
            if (!*at)
                list->last = at;
            return true;
        }
    return false;
}

/* --- the end of a command --------------------------------------------------------------------- */

/* Takes the command from its request; NULL: it has ended already. With the lock taken. */
static struct scsi_command *take_command(struct request *request)
{
    struct scsi_command *command = request->command;

    if (!command)
        return NULL;
    request->command = NULL;
    command->private_data = NULL;
    request->target->counters.commands++;
    return command;
}

/* With the lock taken, which is released. The request is gone. */
static void end_request(struct request *request, struct list *list, enum scsi_delivery delivery)
{
    struct iscsi_target *target = request->target;
    struct scsi_command *command = take_command(request);

    take_out(list, request);
    if (target->aborting == request)
        target->aborting = NULL;
    if (command && delivery == SCSI_TRANSPORT_FAILURE)
        target->counters.failed++;
    pthread_mutex_unlock(&target->lock);
    if (command) {
        command->delivery = (uint8_t)(request->cancelled ? SCSI_ABORTED : delivery);
        scsi_done_elsewhere(command);
    }
    if (request->task)
        scsi_free_scsi_task(request->task);
    free(request);
}

/* Fills in what the target answered. */
static void answer(struct request *request, struct scsi_command *command, int status)
{
    const struct scsi_task *task = request->task;
    uint32_t moved = request->out_size + request->in_size;

    if (task->residual_status == SCSI_RESIDUAL_UNDERFLOW)
        moved -= task->residual < moved ? (uint32_t)task->residual : moved;
    command->status = (uint8_t)status;
    command->transferred = moved;
    if (status == SCSI_STATUS_CHECK_CONDITION && task->datain.size > 2) {
        /* The length of the sense data, then these (RFC 7143, 11.4.7). */
        uint32_t size = (uint32_t)task->datain.size - 2, told = scsi_be16(task->datain.data);

        size = size < told ? size : told;
        size = size < SCSI_SENSE_MAX ? size : SCSI_SENSE_MAX;
        memcpy(command->sense, task->datain.data + 2, size);
        command->sense_size = size;
        if (task->residual_status != SCSI_RESIDUAL_UNDERFLOW && request->in_size > 0)
            moved = command->transferred = 0; /* nobody says how much came */
    }
    if (request->in_size > 0) {
        if (status == SCSI_STATUS_GOOD)
            scsi_pass_patch(&request->target->limits, request->cdb, request->data, moved);
        scsi_pass_scatter(request->data, moved, &command->in);
    }
}

static void command_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    struct request *request = argument;
    struct iscsi_target *target = request->target;

    (void)context;
    (void)data;
    pthread_mutex_lock(&target->lock);
    if (status == SCSI_STATUS_TIMEOUT && request->command) {
        /* The target may execute it yet: it ends when that can no longer be. */
        target->lost = true;
        pthread_mutex_unlock(&target->lock);
        return;
    }
    if (status == SCSI_STATUS_CANCELLED)
        target->lost = true;
    if (status >= 0 && status <= 0xFF && request->command && !request->cancelled)
        answer(request, request->command, status);
    end_request(request, &target->sent,
                status <= 0xFF                     ? SCSI_DELIVERED
                : status == SCSI_STATUS_CANCELLED ? SCSI_TRANSPORT_FAILURE
                                                  : SCSI_FAILURE);
}

/* --- the session ------------------------------------------------------------------------------ */

static void fail(struct iscsi_target *target)
{
    if (target->session == CONNECTING && target->context)
        snprintf(target->error, sizeof(target->error), "%s", iscsi_get_error(target->context));
    target->session = FAILED;
}

static void login_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    struct iscsi_target *target = argument;
    const char *other;

    (void)data;
    if (status == SCSI_STATUS_GOOD) {
        target->session = LOGGED_IN;
        target->next_ping = now() + target->ping_seconds;
        pthread_mutex_lock(&target->lock);
        target->counters.sessions++;
        target->counters.connected = true;
        pthread_mutex_unlock(&target->lock);
        return;
    }
    fail(target);
    other = iscsi_get_target_address(context);
    if (status == SCSI_STATUS_REDIRECT && other)
        snprintf(target->redirected, sizeof(target->redirected), "%s", other);
}

static void connect_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    struct iscsi_target *target = argument;

    (void)data;
    if (status != SCSI_STATUS_GOOD || iscsi_login_async(context, login_cb, target) != 0)
        fail(target);
}

static void start_session(struct iscsi_target *target, uint32_t seconds)
{
    const char *portal = target->redirected[0] ? target->redirected : target->portal;

    target->next_attempt = now() + RETRY_SECONDS;
    target->login_deadline = now() + seconds;
    target->context = iscsi_create_context(target->initiator);
    if (!target->context)
        return;
    target->session = CONNECTING;
    iscsi_set_isid_random(target->context, target->session_id, 0);
    iscsi_set_targetname(target->context, target->name);
    iscsi_set_session_type(target->context, ISCSI_SESSION_NORMAL);
    iscsi_set_header_digest(target->context, ISCSI_HEADER_DIGEST_NONE_CRC32C);
    iscsi_set_noautoreconnect(target->context, 1); /* we know better what can be repeated */
    if (target->user[0])
        iscsi_set_initiator_username_pwd(target->context, target->user, target->password);
    if (iscsi_connect_async(target->context, portal, connect_cb, target) != 0)
        fail(target);
    target->redirected[0] = 0;
}

/* Gives the session up, and ends what was sent in it. */
static void end_session(struct iscsi_target *target)
{
    struct iscsi_context *context = target->context;
    struct request *request;

    pthread_mutex_lock(&target->lock);
    target->counters.connected = false;
    pthread_mutex_unlock(&target->lock);
    target->context = NULL;
    target->session = NO_SESSION;
    if (context)
        iscsi_destroy_context(context); /* most requests end here */
    for (;;) {
        pthread_mutex_lock(&target->lock);
        request = target->sent.first;
        if (!request)
            break;
        end_request(request, &target->sent, SCSI_TRANSPORT_FAILURE);
    }
    pthread_mutex_unlock(&target->lock);
    target->lost = false;
}

/* Hands a request to the library. False when it did not take it. */
static bool send_request(struct iscsi_target *target, struct request *request)
{
    struct scsi_task *task =
        scsi_create_task((int)request->cdb_size, request->cdb,
                         request->out_size > 0  ? SCSI_XFER_WRITE
                         : request->in_size > 0 ? SCSI_XFER_READ
                                                : SCSI_XFER_NONE,
                         (int)(request->out_size + request->in_size));

    if (!task)
        return false;
    request->task = task;
    if ((request->out_size > 0 &&
         scsi_task_add_data_out_buffer(task, (int)request->out_size, request->data) != 0) ||
        (request->in_size > 0 &&
         scsi_task_add_data_in_buffer(task, (int)request->in_size, request->data) != 0))
        return false;
    iscsi_set_timeout(target->context, (int)scsi_pass_timeout(request->cdb));
    return iscsi_scsi_command_async(target->context, target->address, task, command_cb, NULL,
                                    request) == 0;
}

static void send_waiting(struct iscsi_target *target)
{
    pthread_mutex_lock(&target->lock);
    while (target->waiting.first) {
        struct request *request = target->waiting.first;

        take_out(&target->waiting, request);
        append(&target->sent, request);
        if (send_request(target, request))
            continue;
        end_request(request, &target->sent, SCSI_QUEUE_BUSY);
        pthread_mutex_lock(&target->lock);
    }
    pthread_mutex_unlock(&target->lock);
}

/* Ends what has waited for too long, or (`all`) what waits. */
static void expire_waiting(struct iscsi_target *target, bool all)
{
    for (;;) {
        struct request *request;

        pthread_mutex_lock(&target->lock);
        request = target->waiting.first; /* the one that waits longest */
        if (!request || (!all && request->deadline > now()))
            break;
        end_request(request, &target->waiting, SCSI_TRANSPORT_FAILURE);
    }
    pthread_mutex_unlock(&target->lock);
}

/* --- what a target is asked to forget --------------------------------------------------------- */

static void abort_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    struct iscsi_target *target = argument;
    struct scsi_command *command = NULL;

    (void)context;
    pthread_mutex_lock(&target->lock);
    if (status == SCSI_STATUS_GOOD && data &&
        (*(uint32_t *)data == ISCSI_TMR_FUNC_COMPLETE ||
         *(uint32_t *)data == ISCSI_TMR_TASK_DOES_NOT_EXIST)) {
        if (target->aborting) /* its request stays with the library, which waits in vain */
            command = take_command(target->aborting);
    } else if (target->aborting) {
        target->lost = true;
    }
    target->aborting = NULL;
    pthread_mutex_unlock(&target->lock);
    if (command) {
        command->delivery = SCSI_ABORTED;
        scsi_done_elsewhere(command);
    }
}

/* One after the other, as they are rare. */
static void abort_cancelled(struct iscsi_target *target)
{
    struct request *request;

    pthread_mutex_lock(&target->lock);
    if (target->aborting && now() >= target->abort_deadline)
        target->lost = true;
    for (request = target->sent.first; request && !target->aborting; request = request->next)
        if (request->cancelled && request->command) {
            target->aborting = request;
            target->abort_deadline = now() + ABORT_SECONDS;
            iscsi_set_timeout(target->context, 0);
            if (iscsi_task_mgmt_async(target->context, target->address, ISCSI_TM_ABORT_TASK,
                                      request->task->itt, request->task->cmdsn, abort_cb,
                                      target) != 0)
                target->lost = true;
        }
    pthread_mutex_unlock(&target->lock);
}

static void reset_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    (void)context;
    (void)status;
    (void)data;
    (void)argument;
}

static void reset_unit(struct iscsi_target *target)
{
    bool wanted;

    pthread_mutex_lock(&target->lock);
    wanted = target->resetting && target->sent.first;
    target->resetting = false;
    pthread_mutex_unlock(&target->lock);
    if (!wanted)
        return;
    iscsi_set_timeout(target->context, 0);
    (void)iscsi_task_mgmt_async(target->context, target->address, ISCSI_TM_LUN_RESET, 0xFFFFFFFF,
                                0, reset_cb, NULL);
}

/* --- the thread ------------------------------------------------------------------------------- */

/* Whether the connection still lives: an idle one has to be asked. */
static void ping(struct iscsi_target *target)
{
    if (now() < target->next_ping)
        return;
    target->next_ping = now() + target->ping_seconds;
    if (iscsi_get_nops_in_flight(target->context) >= PINGS_MAX)
        target->lost = true;
    iscsi_set_timeout(target->context, 0);
    if (iscsi_nop_out_async(target->context, NULL, NULL, 0, NULL) != 0)
        target->lost = true;
}

/* Waits for the network, for somebody who wakes us up, or for a tick; and goes on with the session. */
static int step(struct iscsi_target *target)
{
    struct pollfd fds[2] = {{.fd = target->wake_fd, .events = POLLIN}, {.fd = -1}};

    if (target->context && target->session != FAILED) {
        fds[1].fd = iscsi_get_fd(target->context);
        fds[1].events = (short)iscsi_which_events(target->context);
    }
    if (poll(fds, 2, TICK_MILLISECONDS) < 0 && errno != EINTR)
        return -errno;
    if (fds[0].revents)
        eventfd_take(target->wake_fd);
    if (target->context && target->session != FAILED &&
        iscsi_service(target->context, fds[1].revents) < 0)
        fail(target);
    if (target->session == CONNECTING && now() >= target->login_deadline) {
        target->session = FAILED;
        snprintf(target->error, sizeof(target->error), "no answer");
    }
    if (target->session == FAILED || target->lost)
        end_session(target);
    return 0;
}

static void go_on(struct iscsi_target *target)
{
    if (target->session == LOGGED_IN) {
        send_waiting(target);
        abort_cancelled(target);
        reset_unit(target);
        ping(target);
        if (target->lost)
            end_session(target);
    } else {
        if (target->session == NO_SESSION && now() >= target->next_attempt)
            start_session(target, LOGIN_SECONDS);
        expire_waiting(target, false);
    }
}

static bool stopping(struct iscsi_target *target)
{
    bool value;

    pthread_mutex_lock(&target->lock);
    value = target->stopping;
    pthread_mutex_unlock(&target->lock);
    return value;
}

static void logout_cb(struct iscsi_context *context, int status, void *data, void *argument)
{
    struct iscsi_target *target = argument;

    (void)context;
    (void)status;
    (void)data;
    target->logging_out = false;
}

static void log_out(struct iscsi_target *target)
{
    int64_t deadline = now() + LOGOUT_SECONDS;

    iscsi_set_timeout(target->context, 0);
    target->logging_out = iscsi_logout_async(target->context, logout_cb, target) == 0;
    while (target->logging_out && target->session == LOGGED_IN && now() <= deadline &&
           step(target) == 0)
        ;
}

int iscsi_target_run(struct iscsi_target *target)
{
    sigset_t pipe;
    int result = 0;

    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, NULL); /* the library writes to sockets that may be closed */
    while (!stopping(target) && result == 0) {
        go_on(target);
        result = step(target);
    }
    expire_waiting(target, true);
    if (target->session == LOGGED_IN && result == 0)
        log_out(target);
    end_session(target);
    pthread_mutex_lock(&target->lock);
    target->stopping = false;
    pthread_mutex_unlock(&target->lock);
    return result;
}

void iscsi_target_stop(struct iscsi_target *target)
{
    pthread_mutex_lock(&target->lock);
    target->stopping = true;
    pthread_mutex_unlock(&target->lock);
    eventfd_signal(target->wake_fd);
}

int iscsi_target_connect(struct iscsi_target *target, uint32_t seconds, char *error,
                         uint32_t size)
{
    int64_t deadline = now() + seconds;

    do {
        start_session(target, seconds);
        while (target->session == CONNECTING)
            if (step(target) < 0)
                break;
        if (target->session == LOGGED_IN)
            return 0;
        if (target->session != NO_SESSION)
            end_session(target);
    } while (target->redirected[0] && now() <= deadline);
    snprintf(error, size, "%s", target->error);
    return -1;
}

/* --- what the front end calls ----------------------------------------------------------------- */

static void execute(struct scsi_lun *lun, struct scsi_command *command)
{
    struct iscsi_target *target = (struct iscsi_target *)lun;
    uint32_t cdb_size = scsi_pass_cdb_size(command->cdb);
    uint32_t out = command->out.bytes, in = command->in.bytes;
    struct request *request;

    if (scsi_pass_refuses(command)) {
        scsi_done(command);
        return;
    }
    if (cdb_size > CDB_MAX || out > SCSI_PASS_MAX_BYTES || in > SCSI_PASS_MAX_BYTES) {
        scsi_sense(command, SCSI_SENSE(0x5, 0x24, 0x00)); /* INVALID FIELD IN CDB */
        scsi_done(command);
        return;
    }
    request = calloc(1, sizeof(*request) + out + in);
    if (!request) {
        command->delivery = SCSI_QUEUE_BUSY;
        scsi_done(command);
        return;
    }
    request->target = target;
    request->command = command;
    request->deadline = now() + target->wait_seconds;
    request->cdb_size = cdb_size;
    memcpy(request->cdb, command->cdb, cdb_size);
    request->out_size = out;
    request->in_size = in;
    if (out > 0)
        scsi_pass_gather(&command->out, request->data);
    pthread_mutex_lock(&target->lock);
    command->private_data = request;
    append(&target->waiting, request);
    pthread_mutex_unlock(&target->lock);
    eventfd_signal(target->wake_fd);
}

static void cancel(struct scsi_lun *lun, struct scsi_command *command)
{
    struct iscsi_target *target = (struct iscsi_target *)lun;
    struct request *request;
    bool ends = false;

    pthread_mutex_lock(&target->lock);
    request = command->private_data;
    if (request && (take_out(&target->waiting, request) || request->in_size > 0)) {
        /* It has not been sent, or (see scsi_host.c) cannot do harm when it is executed later. */
        ends = true;
        take_command(request);
        if (!request->task)
            free(request);
    } else if (request) {
        request->cancelled = true;
    }
    pthread_mutex_unlock(&target->lock);
    if (ends) {
        command->delivery = SCSI_ABORTED;
        scsi_done(command);
    } else {
        eventfd_signal(target->wake_fd);
    }
}

/* A target that holds nothing of ours has nothing to abort, and others may be using it. */
static void reset(struct scsi_lun *lun)
{
    struct iscsi_target *target = (struct iscsi_target *)lun;

    pthread_mutex_lock(&target->lock);
    target->resetting = true;
    pthread_mutex_unlock(&target->lock);
    eventfd_signal(target->wake_fd);
}

static const struct scsi_lun_ops target_ops = {
    .execute = execute,
    .cancel = cancel,
    .reset = reset,
};

/* --- create and destroy ----------------------------------------------------------------------- */

struct iscsi_target *iscsi_target_create(const struct iscsi_target_config *config)
{
    struct iscsi_target *target = calloc(1, sizeof(*target));

    if (!target)
        return NULL;
    target->portal = strdup(config->portal);
    target->name = strdup(config->target);
    target->initiator = strdup(config->initiator);
    target->user = strdup(config->user);
    target->password = strdup(config->password);
    /* Peripheral device addressing, or flat (SAM-5, 4.7.7). */
    target->address = (int)(config->lun < 256 ? config->lun : 0x4000 | config->lun);
    target->wait_seconds = config->wait_seconds;
    target->ping_seconds = config->ping_seconds;
    target->waiting.last = &target->waiting.first;
    target->sent.last = &target->sent.first;
    target->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (getrandom(&target->session_id, sizeof(target->session_id), 0) < 0)
        target->session_id = (uint32_t)getpid();
    if (!target->portal || !target->name || !target->initiator || !target->user ||
        !target->password || target->wake_fd < 0 ||
        scsi_lun_init(&target->lun, &target_ops, NULL, 0) < 0) {
        if (target->wake_fd >= 0)
            close(target->wake_fd);
        free(target->portal);
        free(target->name);
        free(target->initiator);
        free(target->user);
        free(target->password);
        free(target);
        errno = ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&target->lock, NULL);
    return target;
}

void iscsi_target_destroy(struct iscsi_target *target)
{
    if (!target)
        return;
    end_session(target);
    close(target->wake_fd);
    pthread_mutex_destroy(&target->lock);
    scsi_lun_destroy(&target->lun);
    free(target->portal);
    free(target->name);
    free(target->initiator);
    free(target->user);
    free(target->password);
    free(target);
}

struct scsi_lun *iscsi_target_lun(struct iscsi_target *target)
{
    return &target->lun;
}

void iscsi_target_set_limits(struct iscsi_target *target, const struct scsi_pass_limits *limits)
{
    target->limits = *limits;
}

struct iscsi_target_counters iscsi_target_counters(struct iscsi_target *target)
{
    struct iscsi_target_counters counters;

    pthread_mutex_lock(&target->lock);
    counters = target->counters;
    pthread_mutex_unlock(&target->lock);
    return counters;
}

/* --- queries ---------------------------------------------------------------------------------- */

static void note_end(struct scsi_command *command)
{
    command->lun = NULL;
}

int iscsi_target_query(struct iscsi_target *target, const uint8_t *cdb, uint32_t cdb_size,
                       void *data, uint32_t size)
{
    struct scsi_worker worker;
    struct iovec iov = {data, size};
    struct scsi_command command = {
        .worker = &worker,
        .lun = &target->lun,
        .in = {&iov, 1, size},
        .cdb_size = CDB_MAX,
        .done = note_end,
    };
    int64_t deadline = now() + QUERY_SECONDS;
    int result = 0;

    if (scsi_worker_init(&worker, target->wake_fd) < 0)
        return -ENOMEM;
    memcpy(command.cdb, cdb, cdb_size);
    execute(&target->lun, &command);
    while (command.lun && result == 0) {
        if (now() > deadline)
            end_session(target); /* which ends the command */
        else if (target->session == LOGGED_IN)
            go_on(target);
        else
            expire_waiting(target, true);
        if (command.lun && !scsi_worker_take(&worker))
            result = step(target);
        else
            command.lun = NULL;
    }
    if (command.lun) {
        end_session(target);
        expire_waiting(target, true);
    }
    scsi_worker_destroy(&worker);
    if (result < 0)
        return result;
    if (command.delivery != SCSI_DELIVERED || command.status != SCSI_GOOD)
        return -EIO;
    return (int)command.transferred;
}
