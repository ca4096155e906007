#include "blk_nbd.h"

#include <errno.h>
#include <libnbd.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "blk_remote.h"

/* What every server takes in one request. */
#define MAX_PAYLOAD (32u << 20)
#define MAX_IDLE 64 /* connections kept while no thread uses them */

struct blk_nbd {
    struct blk_remote remote;
    char *uri;
    int64_t answer_ms;
    struct blk_nbd_info info;
    pthread_mutex_t lock; /* for all below */
    struct nbd_handle *idle[MAX_IDLE];
    unsigned idle_count;
    struct nbd_link *attached; /* the last of them frees what was closed */
    bool closing;
};

enum state { DOWN, CONNECTING, UP };

struct nbd_link {
    struct blk_link link;
    struct blk_nbd *nbd;
    struct nbd_link *next_attached;
    enum state state;
    struct nbd_handle *handle; /* unless DOWN */
    int epoll_fd;
    int fd; /* the socket that epoll_fd has, or -1 */
    uint32_t events;
    int timer_fd;
    int64_t timer_at;    /* when it fires, or 0 */
    int64_t answered_at; /* when the server last did anything, while something is under way */
    int64_t retry_at;    /* DOWN: no connecting before */
    uint32_t under_way;
    struct command *waiting; /* for a connection */
    struct command *ended;   /* done is to be called, once libnbd has returned */
    struct command **ended_tail;
};

/* A step on its way. */
struct command {
    struct command *next;
    struct nbd_link *link;
    struct blk_request *request;
    struct blk_step step;
    int64_t result;
};

static int64_t now_ms(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static void set_timer(struct nbd_link *link, int64_t at)
{
    struct itimerspec spec = {.it_value = {at / 1000, at % 1000 * 1000000}};

    link->timer_at = at;
    timerfd_settime(link->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

/* --- connections -------------------------------------------------------------------------- */

static struct nbd_handle *connect_start(const char *uri)
{
    struct nbd_handle *handle = nbd_create();

    if (!handle)
        return NULL;
    nbd_set_pread_initialize(handle, false);    /* data of failed reads is not given to anybody */
    nbd_set_uri_allow_local_file(handle, true); /* TLS keys: the URI is the user's own */
    if (nbd_aio_connect_uri(handle, uri) < 0) {
        nbd_close(handle);
        return NULL;
    }
    return handle;
}

static bool broken(struct nbd_handle *handle)
{
    return nbd_aio_is_dead(handle) > 0 || nbd_aio_is_closed(handle) > 0;
}

static void disconnect(struct nbd_handle *handle)
{
    if (nbd_aio_is_ready(handle) > 0)
        nbd_aio_disconnect(handle, 0);
    nbd_close(handle);
}

static void end_command(struct command *command, int64_t result)
{
    struct nbd_link *link = command->link;

    command->result = result;
    command->next = NULL;
    *link->ended_tail = command;
    link->ended_tail = &command->next;
    link->link.ready = true;
}

/* libnbd's callback, in which libnbd must not be called. */
static int command_done(void *opaque, int *error)
{
    struct command *command = opaque;

    command->link->under_way--;
    end_command(command, *error ? -(int64_t)*error : command->result);
    return 1;
}

/* Tells epoll what libnbd waits for. */
static void update_events(struct nbd_link *link)
{
    int fd = nbd_aio_get_fd(link->handle);
    unsigned direction = nbd_aio_get_direction(link->handle);
    struct epoll_event event = {0};

    if (direction & LIBNBD_AIO_DIRECTION_READ)
        event.events |= EPOLLIN;
    if (direction & LIBNBD_AIO_DIRECTION_WRITE)
        event.events |= EPOLLOUT;
    if (fd < 0 || (fd == link->fd && event.events == link->events))
        return;
    /* A new socket may have the number of the old one. */
    if (epoll_ctl(link->epoll_fd, EPOLL_CTL_MOD, fd, &event) < 0 && errno == ENOENT)
        epoll_ctl(link->epoll_fd, EPOLL_CTL_ADD, fd, &event);
    link->fd = fd;
    link->events = event.events;
}

static void go_down(struct nbd_link *link, int64_t retry_at)
{
    struct command *command;

    if (link->handle)
        nbd_close(link->handle);
    link->handle = NULL;
    link->state = DOWN;
    link->fd = -1;
    link->retry_at = retry_at;
    while ((command = link->waiting)) {
        link->waiting = command->next;
        end_command(command, -EIO);
    }
}

static void start_connecting(struct nbd_link *link)
{
    int64_t now = now_ms();

    link->handle = connect_start(link->nbd->uri);
    if (!link->handle) {
        go_down(link, now + BLK_NBD_RETRY_MS);
        return;
    }
    link->state = CONNECTING;
    set_timer(link, now + BLK_NBD_CONNECT_MS);
    update_events(link);
    link->link.ready = true; /* it may be there already */
}

/* --- steps -------------------------------------------------------------------------------- */

/* Hands the command to libnbd. True if it is done already, with its result. */
static bool issue(struct command *command, int64_t *result)
{
    struct nbd_link *link = command->link;
    const struct blk_step *step = &command->step;
    const struct blk_nbd_info *info = &link->nbd->info;
    nbd_completion_callback callback = {.callback = command_done, .user_data = command};
    uint32_t fua = step->stable && info->fua ? LIBNBD_CMD_FLAG_FUA : 0;
    size_t size = 0;
    int64_t cookie = -1;

    command->result = 0;
    if (step->kind == BLK_STEP_READ || step->kind == BLK_STEP_WRITE) {
        size = step->iov->iov_len < MAX_PAYLOAD ? step->iov->iov_len : MAX_PAYLOAD;
        command->result = (int64_t)size;
    }
    *result = -EOPNOTSUPP;
    switch (step->kind) {
    case BLK_STEP_READ:
        cookie = nbd_aio_pread(link->handle, step->iov->iov_base, size, step->offset, callback, 0);
        break;
    case BLK_STEP_WRITE:
        cookie = nbd_aio_pwrite(link->handle, step->iov->iov_base, size, step->offset, callback,
                                fua);
        break;
    case BLK_STEP_SYNC:
        *result = 0;
        if (nbd_can_flush(link->handle) <= 0) /* then a write is as stable as it gets */
            return true;
        cookie = nbd_aio_flush(link->handle, callback, 0);
        break;
    case BLK_STEP_ALLOCATE:
        if (nbd_can_zero(link->handle) <= 0)
            return true;
        cookie = nbd_aio_zero(link->handle, step->length, step->offset, callback,
                              step->mode & FALLOC_FL_PUNCH_HOLE ? 0 : LIBNBD_CMD_FLAG_NO_HOLE);
        break;
    case BLK_STEP_DISCARD:
        if (nbd_can_trim(link->handle) <= 0)
            return true;
        cookie = nbd_aio_trim(link->handle, step->length, step->offset, callback, 0);
        break;
    }
    if (cookie < 0) {
        int error = nbd_get_errno();

        *result = error && error != EAGAIN && error != EINTR ? -error : -EIO; /* no retries here */
        link->link.ready = true; /* the connection may be gone */
        return true;
    }
    if (link->under_way++ == 0) {
        link->answered_at = now_ms();
        if (!link->timer_at)
            set_timer(link, link->answered_at + link->nbd->answer_ms);
    }
    return false;
}

static bool link_start(struct blk_link *base, struct blk_request *request,
                       const struct blk_step *step, int64_t *result)
{
    struct nbd_link *link = (struct nbd_link *)base;
    struct command *command;

    *result = -EIO;
    if (link->state == DOWN && now_ms() < link->retry_at)
        return true;
    command = malloc(sizeof(*command));
    if (!command) {
        *result = -ENOMEM;
        return true;
    }
    *command = (struct command){.link = link, .request = request, .step = *step};
    if (link->state == UP) {
        if (issue(command, result)) {
            free(command);
            return true;
        }
        update_events(link);
        return false;
    }
    command->next = link->waiting;
    link->waiting = command;
    if (link->state == DOWN)
        start_connecting(link);
    return false;
}

/* --- service ------------------------------------------------------------------------------ */

static void connected(struct nbd_link *link)
{
    struct command *command = link->waiting;
    struct command *first = NULL;
    int64_t result;

    if (nbd_get_size(link->handle) < link->nbd->info.size) { /* another disk */
        go_down(link, now_ms() + BLK_NBD_RETRY_MS);
        return;
    }
    link->state = UP;
    set_timer(link, 0);
    link->waiting = NULL;
    while (command) { /* the last to wait stands first */
        struct command *next = command->next;

        command->next = first;
        first = command;
        command = next;
    }
    while ((command = first)) {
        first = command->next;
        if (issue(command, &result))
            end_command(command, result);
    }
}

static void check_timer(struct nbd_link *link)
{
    int64_t now = now_ms();
    uint64_t count;

    if (!link->timer_at || now < link->timer_at)
        return;
    if (read(link->timer_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return;
    link->timer_at = 0;
    if (link->state == CONNECTING)
        go_down(link, now + BLK_NBD_RETRY_MS);
    else if (link->under_way > 0 && now - link->answered_at >= link->nbd->answer_ms)
        shutdown(link->fd, SHUT_RDWR); /* so that libnbd ends what is under way */
    else if (link->under_way > 0)
        set_timer(link, link->answered_at + link->nbd->answer_ms);
}

static void call_done(struct nbd_link *link)
{
    struct command *command;

    while ((command = link->ended)) {
        struct blk_request *request = command->request;
        int64_t result = command->result;

        link->ended = command->next;
        if (!link->ended)
            link->ended_tail = &link->ended;
        free(command);
        link->link.done(link->link.io, request, result); /* may start the next step */
    }
}

static void link_service(struct blk_link *base)
{
    struct nbd_link *link = (struct nbd_link *)base;

    if (__atomic_load_n(&link->nbd->closing, __ATOMIC_RELAXED) && link->under_way == 0 &&
        !link->waiting && !link->ended) {
        base->gone = true;
        return;
    }
    do {
        base->ready = false;
        check_timer(link);
        if (link->handle) {
            while (nbd_poll(link->handle, 0) > 0)
                link->answered_at = now_ms();
            if (broken(link->handle))
                go_down(link, link->state == UP ? 0 : now_ms() + BLK_NBD_RETRY_MS);
            else if (link->state == CONNECTING && nbd_aio_is_ready(link->handle) > 0)
                connected(link);
        }
        if (link->handle)
            update_events(link);
        call_done(link);
    } while (base->ready);
}

/* --- attach and detach -------------------------------------------------------------------- */

static struct nbd_handle *take_idle(struct blk_nbd *nbd)
{
    struct nbd_handle *handle = NULL;

    pthread_mutex_lock(&nbd->lock);
    if (nbd->idle_count > 0)
        handle = nbd->idle[--nbd->idle_count];
    pthread_mutex_unlock(&nbd->lock);
    return handle;
}

static void put_idle(struct blk_nbd *nbd, struct nbd_handle *handle)
{
    pthread_mutex_lock(&nbd->lock);
    if (nbd->idle_count < MAX_IDLE && !nbd->closing) {
        nbd->idle[nbd->idle_count++] = handle;
        handle = NULL;
    }
    pthread_mutex_unlock(&nbd->lock);
    if (handle)
        disconnect(handle);
}

static void free_nbd(struct blk_nbd *nbd)
{
    pthread_mutex_destroy(&nbd->lock);
    free(nbd->uri);
    free(nbd);
}

static void join(struct nbd_link *link)
{
    pthread_mutex_lock(&link->nbd->lock);
    link->next_attached = link->nbd->attached;
    link->nbd->attached = link;
    pthread_mutex_unlock(&link->nbd->lock);
}

static void leave(struct nbd_link *link)
{
    struct blk_nbd *nbd = link->nbd;
    struct nbd_link **place = &nbd->attached;
    bool last;

    pthread_mutex_lock(&nbd->lock);
    while (*place != link)
        place = &(*place)->next_attached;
    *place = link->next_attached;
    last = nbd->closing && !nbd->attached;
    pthread_mutex_unlock(&nbd->lock);
    if (last)
        free_nbd(nbd);
}

static void link_detach(struct blk_link *base)
{
    struct nbd_link *link = (struct nbd_link *)base;

    if (link->state == UP && link->under_way == 0 && !broken(link->handle))
        put_idle(link->nbd, link->handle);
    else if (link->handle)
        nbd_close(link->handle);
    leave(link);
    close(link->timer_fd);
    free(link);
}

static struct blk_link *link_attach(struct blk_remote *remote, int epoll_fd)
{
    struct nbd_link *link = calloc(1, sizeof(*link));
    struct epoll_event event = {.events = EPOLLIN};

    if (!link)
        return NULL;
    link->nbd = (struct blk_nbd *)remote; /* its first member */
    link->epoll_fd = epoll_fd;
    link->fd = -1;
    link->ended_tail = &link->ended;
    link->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (link->timer_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, link->timer_fd, &event) < 0) {
        int error = errno;

        if (link->timer_fd >= 0)
            close(link->timer_fd);
        free(link);
        errno = error;
        return NULL;
    }
    join(link);
    link->handle = take_idle(link->nbd);
    if (link->handle) {
        link->state = UP;
        link->link.ready = true; /* it may have broken meanwhile */
        update_events(link);
    }
    return &link->link;
}

/* --- open and close ----------------------------------------------------------------------- */

static void say(char *error, size_t size, const char *words)
{
    const char *colon = words ? strstr(words, ": ") : NULL;

    /* libnbd begins with the name of its function. */
    if (colon && strncmp(words, "nbd_", 4) == 0)
        words = colon + 2;
    snprintf(error, size, "%s", words ? words : "unknown error");
}

/* Whether the connection is ready in time. */
static bool await_ready(struct nbd_handle *handle, char *error, size_t error_size)
{
    int64_t deadline = now_ms() + BLK_NBD_CONNECT_MS;

    while (nbd_aio_is_ready(handle) <= 0) {
        int64_t left = deadline - now_ms();

        if (left <= 0) {
            say(error, error_size, "no answer");
            return false;
        }
        if (nbd_poll(handle, (int)left) < 0 || broken(handle)) {
            say(error, error_size, nbd_get_error());
            return false;
        }
    }
    return true;
}

struct blk_nbd *blk_nbd_open(const char *uri, int64_t answer_ms, struct blk_nbd_info *info,
                             char *error, size_t error_size)
{
    struct nbd_handle *handle = connect_start(uri);
    struct blk_nbd *nbd;

    if (!handle) {
        say(error, error_size, nbd_get_error());
        return NULL;
    }
    if (!await_ready(handle, error, error_size)) {
        nbd_close(handle);
        return NULL;
    }
    nbd = calloc(1, sizeof(*nbd));
    if (nbd)
        nbd->uri = strdup(uri);
    if (!nbd || !nbd->uri) {
        say(error, error_size, strerror(ENOMEM));
        free(nbd);
        nbd_close(handle);
        return NULL;
    }
    nbd->remote = (struct blk_remote){link_attach, link_detach, link_start, link_service};
    nbd->answer_ms = answer_ms;
    pthread_mutex_init(&nbd->lock, NULL);
    nbd->idle[nbd->idle_count++] = handle;
    nbd->info = (struct blk_nbd_info){
        .size = nbd_get_size(handle),
        .minimum_block = nbd_get_block_size(handle, LIBNBD_SIZE_MINIMUM),
        .preferred_block = nbd_get_block_size(handle, LIBNBD_SIZE_PREFERRED),
        .readonly = nbd_is_read_only(handle) > 0,
        .multi_conn = nbd_can_multi_conn(handle) > 0,
        .fua = nbd_can_fua(handle) > 0,
        .trim = nbd_can_trim(handle) > 0,
    };
    *info = nbd->info;
    return nbd;
}

void blk_nbd_close(struct blk_nbd *nbd)
{
    const struct itimerspec at_once = {.it_value = {0, 1}};
    bool unused;

    if (!nbd)
        return;
    pthread_mutex_lock(&nbd->lock);
    while (nbd->idle_count > 0)
        disconnect(nbd->idle[--nbd->idle_count]);
    __atomic_store_n(&nbd->closing, true, __ATOMIC_RELAXED);
    for (struct nbd_link *link = nbd->attached; link; link = link->next_attached)
        timerfd_settime(link->timer_fd, 0, &at_once, NULL); /* its thread wakes up */
    unused = !nbd->attached;
    pthread_mutex_unlock(&nbd->lock);
    if (unused)
        free_nbd(nbd);
}

struct blk_remote *blk_nbd_remote(struct blk_nbd *nbd)
{
    return &nbd->remote;
}

bool blk_nbd_has_tls(void)
{
    struct nbd_handle *handle = nbd_create();
    bool tls = handle && nbd_supports_tls(handle) > 0;

    if (handle)
        nbd_close(handle);
    return tls;
}
