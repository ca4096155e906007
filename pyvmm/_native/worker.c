#include "worker.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define EVENTS_PER_WAIT 16

struct worker {
    int epoll_fd;
    int stop_fd;
};

struct worker *worker_create(void)
{
    struct worker *worker = malloc(sizeof(*worker));
    if (!worker)
        return NULL;
    worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    worker->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (worker->epoll_fd < 0 || worker->stop_fd < 0 ||
        epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->stop_fd, &event) < 0) {
        int error = errno;
        worker_destroy(worker);
        errno = error;
        return NULL;
    }
    return worker;
}

void worker_destroy(struct worker *worker)
{
    if (!worker)
        return;
    if (worker->epoll_fd >= 0)
        close(worker->epoll_fd);
    if (worker->stop_fd >= 0)
        close(worker->stop_fd);
    free(worker);
}

static int control(struct worker *worker, int op, struct worker_source *source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = source};
    return epoll_ctl(worker->epoll_fd, op, source->fd, &event) < 0 ? -errno : 0;
}

int worker_add(struct worker *worker, struct worker_source *source, uint32_t epoll_events)
{
    return control(worker, EPOLL_CTL_ADD, source, epoll_events);
}

int worker_modify(struct worker *worker, struct worker_source *source, uint32_t epoll_events)
{
    return control(worker, EPOLL_CTL_MOD, source, epoll_events);
}

int worker_remove(struct worker *worker, struct worker_source *source)
{
    return control(worker, EPOLL_CTL_DEL, source, 0);
}

int worker_run(struct worker *worker)
{
    struct epoll_event events[EVENTS_PER_WAIT];

    for (;;) {
        int count = epoll_wait(worker->epoll_fd, events, EVENTS_PER_WAIT, -1);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        for (int i = 0; i < count; i++) {
            struct worker_source *source = events[i].data.ptr;
            if (!source) {
                eventfd_take(worker->stop_fd);
                return 0;
            }
            source->ready(source, events[i].events);
        }
    }
}

void worker_stop(struct worker *worker)
{
    eventfd_signal(worker->stop_fd);
}

uint64_t eventfd_take(int fd)
{
    uint64_t count;
    return read(fd, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

void eventfd_signal(int fd)
{
    /* EAGAIN means that the counter is full, so the reader is already due to wake up. */
    uint64_t one = 1;
    ssize_t written = write(fd, &one, sizeof(one));
    (void)written;
}
