#include "console_watch.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "worker.h"

/* The kernel's own words, kernel/panic.c. No proper prefix of it occurs again inside it (its 'K'
 * is unique), so a mismatch can only restart at its first character. */
static const char PANIC[] = "Kernel panic - not syncing";

struct console_watch {
    pthread_mutex_t lock;
    int panic_fd;
    size_t matched;
    uint64_t fed;
    uint8_t tail[CONSOLE_TAIL_SIZE];
};

struct console_watch *console_watch_create(int panic_fd)
{
    struct console_watch *watch = calloc(1, sizeof(*watch));
    if (!watch)
        return NULL;
    pthread_mutex_init(&watch->lock, NULL);
    watch->panic_fd = panic_fd;
    return watch;
}

void console_watch_destroy(struct console_watch *watch)
{
    if (!watch)
        return;
    pthread_mutex_destroy(&watch->lock);
    free(watch);
}

void console_watch_feed(struct console_watch *watch, const void *data, size_t size)
{
    const uint8_t *bytes = data;

    pthread_mutex_lock(&watch->lock);
    for (size_t i = 0; i < size; i++) {
        watch->tail[watch->fed++ % CONSOLE_TAIL_SIZE] = bytes[i];
        if (bytes[i] == PANIC[watch->matched])
            watch->matched++;
        else
            watch->matched = bytes[i] == PANIC[0];
        if (watch->matched == sizeof(PANIC) - 1) {
            watch->matched = 0;
            if (watch->panic_fd >= 0)
                eventfd_signal(watch->panic_fd);
        }
    }
    pthread_mutex_unlock(&watch->lock);
}

size_t console_watch_tail(struct console_watch *watch, uint8_t *tail)
{
    pthread_mutex_lock(&watch->lock);
    size_t start = watch->fed % CONSOLE_TAIL_SIZE;
    size_t size = start;
    if (watch->fed >= CONSOLE_TAIL_SIZE) {
        size = CONSOLE_TAIL_SIZE;
        memcpy(tail, watch->tail + start, CONSOLE_TAIL_SIZE - start);
        tail += CONSOLE_TAIL_SIZE - start;
    }
    memcpy(tail, watch->tail, start);
    pthread_mutex_unlock(&watch->lock);
    return size;
}
