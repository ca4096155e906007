/* An event loop for one thread: Python starts the thread, which then lives inside worker_run. */
#ifndef PYVMM_WORKER_H
#define PYVMM_WORKER_H

#include <stdint.h>

struct worker;

/* A file descriptor the worker watches; `ready` runs on the worker's thread. */
struct worker_source {
    int fd;
    void (*ready)(struct worker_source *source, uint32_t epoll_events);
};

/* NULL with errno set on failure. */
struct worker *worker_create(void);
void worker_destroy(struct worker *worker);

/* Watches source->fd for `epoll_events` (level-triggered). 0 or -errno. The source must stay
 * alive until it is removed or the worker is destroyed. Call these from the worker's thread, or
 * while it does not run. */
int worker_add(struct worker *worker, struct worker_source *source, uint32_t epoll_events);
int worker_modify(struct worker *worker, struct worker_source *source, uint32_t epoll_events);
int worker_remove(struct worker *worker, struct worker_source *source);

/* Serves the sources until worker_stop. 0 or -errno. */
int worker_run(struct worker *worker);

/* Makes worker_run return, also one that has not started yet. Any thread. */
void worker_stop(struct worker *worker);

/* Reads an eventfd that may be level-triggered; returns its count, 0 when there was none. */
uint64_t eventfd_take(int fd);
void eventfd_signal(int fd);

#endif
