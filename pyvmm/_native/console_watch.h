/* Looks at what a guest console prints: keeps the last of it, and notices a kernel panic. */
#ifndef PYVMM_CONSOLE_WATCH_H
#define PYVMM_CONSOLE_WATCH_H

#include <stddef.h>
#include <stdint.h>

#define CONSOLE_TAIL_SIZE 16384

struct console_watch;

/* `panic_fd` is an eventfd, signalled when the output says "Kernel panic - not syncing"; -1: none.
 * NULL with errno set on failure. */
struct console_watch *console_watch_create(int panic_fd);
void console_watch_destroy(struct console_watch *watch);

/* Any thread. */
void console_watch_feed(struct console_watch *watch, const void *data, size_t size);

/* Copies the last bytes of the output, at most CONSOLE_TAIL_SIZE, to `tail`; returns how many. */
size_t console_watch_tail(struct console_watch *watch, uint8_t *tail);

#endif
