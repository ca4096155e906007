#include "virtio_console.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker.h"

/* One turn of a direction of a port: bounds how long the others wait. */
#define BATCH_BYTES (256u << 10)
#define EVENTS_PER_WAIT 32

/* A chain that was taken from a ring and not yet returned: the next `iov_count` entries of the
 * vector are its. */
struct buffer {
    uint16_t head;
    uint16_t iov_count;
    uint32_t bytes;
};

/* One direction of a port: a queue, and the chains of it that are at hand. */
struct lane {
    struct virtq_side side;
    struct buffer *buffers; /* [first_buffer, end_buffer) */
    struct iovec *iov;      /* [first_iov, end_iov) are theirs */
    uint32_t first_buffer, end_buffer;
    uint32_t first_iov, end_iov;
};

struct port {
    bool has_queues;
    struct lane rx, tx;
    struct console_watch *watch;

    int in_fd, out_fd;
    bool is_socket; /* a connection of that kind */
    bool open;     /* the driver's side */
    bool readable; /* no read has said EAGAIN since there last was something */
    bool ended;    /* there is no more input */
    bool hung_up;  /* a connection: its peer has gone; what it sent may still be there */
    bool blocked;  /* a write has said EAGAIN, and EPOLLOUT is awaited */
    bool lost;     /* to be told by virtio_console_take_lost */

    bool listed; /* has something to do */
};

struct virtio_console {
    const struct guest_mem *memory;
    struct virtio_irq *irq;
    int news_fd;
    int wake_fd;
    int epoll_fd;
    uint32_t waiting;     /* atomic: threads that wait for the lock, beside the device's own */
    pthread_mutex_t lock; /* guards all below; the device's thread lets go of it between turns */
    bool stopping;
    bool broken;
    struct virtio_console_counters counters;
    uint32_t *list; /* ports that have something to do */
    uint32_t listed;
    uint32_t port_count;
    struct port ports[];
};

/* What an epoll event is about: the port and one of these, or WAKE alone. */
enum source { KICK, INPUT, OUTPUT };
#define WAKE UINT64_MAX

static void list(struct virtio_console *console, struct port *port)
{
    if (port->has_queues && !port->listed) {
        port->listed = true;
        console->list[console->listed++] = (uint32_t)(port - console->ports);
    }
}

static bool is_connection(const struct port *port)
{
    return port->in_fd >= 0 && port->in_fd == port->out_fd;
}

static int watch_fd(struct virtio_console *console, const struct port *port, int op, int fd,
                    enum source source, uint32_t events)
{
    struct epoll_event event = {
        .events = events | EPOLLET,
        .data.u64 = (uint64_t)(port - console->ports) << 2 | source,
    };

    return epoll_ctl(console->epoll_fd, op, fd, &event) < 0 ? -errno : 0;
}

/* --- both directions ----------------------------------------------------------------------- */

/* Takes chains into the empty lane: what a turn may move, as far as the vector has room for the
 * longest chain. The other part of a chain is none of ours; one without this part goes back. */
static void take_chains(struct virtio_console *console, struct port *port, struct lane *lane,
                        bool writable)
{
    uint32_t size = lane->side.vq.size;
    uint64_t bytes = 0;

    lane->first_buffer = lane->end_buffer = lane->first_iov = lane->end_iov = 0;
    while (bytes < BATCH_BYTES && lane->end_iov <= size) {
        struct virtq_chain chain = {.iov = &lane->iov[lane->end_iov]};
        enum virtq_result result = virtq_side_pop(&lane->side, &chain, lane->end_buffer == 0);
        struct buffer *buffer = &lane->buffers[lane->end_buffer];

        if (result == VIRTQ_BROKEN)
            console->broken = true;
        if (result != VIRTQ_CHAIN)
            return;
        *buffer = (struct buffer){
            .head = chain.head,
            .iov_count = writable ? chain.writable : chain.readable,
            .bytes = writable ? chain.writable_bytes : chain.readable_bytes,
        };
        if (buffer->bytes == 0) {
            virtq_push(&lane->side.vq, chain.head, 0);
            if (++bytes >= size) /* a ring full of them is a turn, too */
                return;
            continue;
        }
        if (writable)
            memmove(chain.iov, chain.iov + chain.readable, chain.writable * sizeof(*chain.iov));
        if (port->watch && !writable) {
            for (uint32_t i = 0; i < buffer->iov_count; i++)
                console_watch_feed(port->watch, chain.iov[i].iov_base, chain.iov[i].iov_len);
        }
        bytes += buffer->bytes;
        lane->end_buffer++;
        lane->end_iov += buffer->iov_count;
    }
}

static bool is_empty(const struct lane *lane)
{
    return lane->first_buffer == lane->end_buffer;
}

/* Whether chains went back in this turn, so that there may be more of them. */
static bool has_returned(const struct lane *lane)
{
    return lane->side.vq.next_used != lane->side.vq.published_used;
}

/* Whether the peer of a connection, which has gone, sent something that was not yet read. */
static bool has_unread(const struct port *port)
{
    struct pollfd polled = {.fd = port->in_fd, .events = POLLIN};
    int size = 0;

    if (port->is_socket)
        return ioctl(port->in_fd, FIONREAD, &size) == 0 && size > 0;
    return poll(&polled, 1, 0) > 0 && polled.revents & POLLIN;
}

/* The connection is over once all that the peer sent has been read. */
static void check_lost(struct virtio_console *console, struct port *port)
{
    if (!port->hung_up || port->lost || (!port->ended && has_unread(port)))
        return;
    port->lost = true;
    eventfd_signal(console->news_fd);
}

/* --- receiving: from the host to the driver ------------------------------------------------ */

static ssize_t read_input(const struct port *port, struct iovec *iov, uint32_t count)
{
    if (port->is_socket) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};

        return recvmsg(port->in_fd, &message, MSG_DONTWAIT);
    }
    return readv(port->in_fd, iov, (int)count);
}

/* Returns the chains that `size` bytes have gone into; the last may be filled in part. */
static void fill_chains(struct lane *lane, size_t size)
{
    while (size > 0) {
        const struct buffer *buffer = &lane->buffers[lane->first_buffer++];
        uint32_t filled = size < buffer->bytes ? (uint32_t)size : buffer->bytes;

        virtq_push(&lane->side.vq, buffer->head, filled);
        lane->first_iov += buffer->iov_count;
        size -= filled;
    }
}

/* True when there may be more. */
static bool receive(struct virtio_console *console, struct port *port)
{
    struct lane *lane = &port->rx;
    ssize_t size;

    if (!port->open || !port->readable || port->ended || port->in_fd < 0)
        return false;
    if (is_empty(lane)) {
        take_chains(console, port, lane, true);
        if (is_empty(lane)) {
            check_lost(console, port);
            return has_returned(lane);
        }
    }
    size = read_input(port, &lane->iov[lane->first_iov], lane->end_iov - lane->first_iov);
    if (size > 0) {
        console->counters.rx_bytes += (uint64_t)size;
        fill_chains(lane, (size_t)size);
        return true;
    }
    if (size < 0 && errno == EINTR)
        return true;
    if (size < 0 && errno == EAGAIN) {
        port->readable = false;
        return false;
    }
    port->ended = true; /* or the peer vanished (EIO of a pseudo-terminal, ECONNRESET) */
    if (size < 0 && is_connection(port))
        port->hung_up = true;
    check_lost(console, port);
    return false;
}

/* --- transmitting: from the driver to the host ---------------------------------------------- */

static ssize_t write_output(const struct port *port, struct iovec *iov, uint32_t count)
{
    if (port->is_socket) {
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};

        return sendmsg(port->out_fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    return writev(port->out_fd, iov, (int)count);
}

/* Returns the chains of which the next `size` bytes are the end, and shortens the one after. */
static void empty_chains(struct lane *lane, size_t size)
{
    while (!is_empty(lane) && size >= lane->buffers[lane->first_buffer].bytes) {
        const struct buffer *buffer = &lane->buffers[lane->first_buffer++];

        virtq_push(&lane->side.vq, buffer->head, 0);
        lane->first_iov += buffer->iov_count;
        size -= buffer->bytes;
    }
    if (size > 0) {
        struct buffer *buffer = &lane->buffers[lane->first_buffer];

        buffer->bytes -= (uint32_t)size;
        for (; size >= lane->iov[lane->first_iov].iov_len; lane->first_iov++) {
            size -= lane->iov[lane->first_iov].iov_len;
            buffer->iov_count--;
        }
        lane->iov[lane->first_iov].iov_base =
            (uint8_t *)lane->iov[lane->first_iov].iov_base + size;
        lane->iov[lane->first_iov].iov_len -= size;
    }
}

static void drop_output(struct virtio_console *console, struct lane *lane)
{
    while (!is_empty(lane)) {
        uint32_t bytes = lane->buffers[lane->first_buffer].bytes;

        console->counters.tx_dropped += bytes;
        empty_chains(lane, bytes);
    }
}

/* Asks to be woken when the host takes more, or no longer to be. */
static void await_room(struct virtio_console *console, struct port *port, bool on)
{
    uint32_t events = on ? EPOLLOUT : 0;

    port->blocked = on;
    if (is_connection(port))
        watch_fd(console, port, EPOLL_CTL_MOD, port->out_fd, INPUT,
                 EPOLLIN | EPOLLRDHUP | events);
    else
        watch_fd(console, port, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, port->out_fd, OUTPUT,
                 events);
}

/* True when there may be more. */
static bool transmit(struct virtio_console *console, struct port *port)
{
    struct lane *lane = &port->tx;
    ssize_t size;

    if (port->blocked)
        return false;
    if (is_empty(lane)) {
        take_chains(console, port, lane, false);
        if (is_empty(lane))
            return has_returned(lane);
    }
    if (port->out_fd < 0 || port->hung_up) {
        drop_output(console, lane);
        return true;
    }
    size = write_output(port, &lane->iov[lane->first_iov], lane->end_iov - lane->first_iov);
    if (size >= 0) {
        console->counters.tx_bytes += (uint64_t)size;
        empty_chains(lane, (size_t)size);
        return true;
    }
    if (errno == EINTR)
        return true;
    if (errno == EAGAIN) {
        await_room(console, port, true);
        return false;
    }
    /* A reader that has gone away, or a full disk, must not stop the guest. */
    drop_output(console, lane);
    if (is_connection(port)) {
        port->hung_up = port->readable = true;
        check_lost(console, port);
    }
    return true;
}

/* --- the loop ------------------------------------------------------------------------------- */

/* Serves each port that has something to do. True when one still has. */
static bool serve(struct virtio_console *console)
{
    uint32_t count = console->listed, left = 0;
    bool interrupt = false;

    for (uint32_t i = 0; i < count && !console->broken; i++) {
        struct port *port = &console->ports[console->list[i]];
        bool more = transmit(console, port);

        more |= receive(console, port);
        interrupt |= virtq_publish(&port->tx.side.vq);
        interrupt |= virtq_publish(&port->rx.side.vq);
        if (more)
            console->list[left++] = console->list[i];
        else
            port->listed = false;
    }
    console->listed = left;
    if (interrupt) {
        console->counters.interrupts++;
        virtio_irq_raise(console->irq, VIRTIO_IRQ_VRING);
    }
    return left > 0;
}

static void take_event(struct virtio_console *console, const struct epoll_event *event)
{
    struct port *port;

    if (event->data.u64 == WAKE)
        return;
    port = &console->ports[event->data.u64 >> 2];
    if ((event->data.u64 & 3) != KICK) {
        /* It may be of a descriptor that has gone meanwhile: these are but hints. */
        if (event->events & EPOLLOUT && port->blocked)
            await_room(console, port, false);
        if (event->events & ~(uint32_t)EPOLLOUT && (event->data.u64 & 3) == INPUT)
            port->readable = true;
        if (event->events & (EPOLLHUP | EPOLLERR)) {
            if (is_connection(port))
                port->hung_up = true;
            if (port->blocked)
                await_room(console, port, false); /* the next write fails */
            check_lost(console, port);
        }
    }
    list(console, port);
}

/* Edges, so that neither notifications have to be read nor input wakes us for which the driver has
 * no room. */
static int loop(struct virtio_console *console)
{
    struct epoll_event events[EVENTS_PER_WAIT];

    for (uint32_t i = 0; i < console->port_count; i++)
        list(console, &console->ports[i]);
    for (;;) {
        bool more = serve(console);
        int count;

        if (console->broken)
            return VIRTIO_CONSOLE_BROKEN;
        if (console->stopping)
            return VIRTIO_CONSOLE_STOPPED;
        more |= console->listed > 0;
        pthread_mutex_unlock(&console->lock);
        while (__atomic_load_n(&console->waiting, __ATOMIC_RELAXED) > 0)
            sched_yield(); /* else a thread with much to do would have the lock again first */
        count = epoll_wait(console->epoll_fd, events, EVENTS_PER_WAIT, more ? 0 : -1);
        pthread_mutex_lock(&console->lock);
        if (count < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < count; i++)
            take_event(console, &events[i]);
    }
}

int virtio_console_run(struct virtio_console *console)
{
    int result;

    pthread_mutex_lock(&console->lock);
    result = loop(console);
    console->stopping = false;
    pthread_mutex_unlock(&console->lock);
    return result;
}

/* Takes the lock on another thread than the device's. */
static void enter(struct virtio_console *console)
{
    __atomic_fetch_add(&console->waiting, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&console->lock);
    __atomic_fetch_sub(&console->waiting, 1, __ATOMIC_RELAXED);
}

static void leave(struct virtio_console *console)
{
    pthread_mutex_unlock(&console->lock);
}

void virtio_console_stop(struct virtio_console *console)
{
    enter(console);
    console->stopping = true;
    leave(console);
    eventfd_signal(console->wake_fd);
}

/* --- what Python tells ----------------------------------------------------------------------- */

/* The port has something to do. Lock held. */
static void wake(struct virtio_console *console, struct port *port)
{
    list(console, port);
    eventfd_signal(console->wake_fd);
}

int virtio_console_connect(struct virtio_console *console, uint32_t number, int in_fd, int out_fd)
{
    struct port *port = &console->ports[number];
    struct stat status;
    int result = 0;

    enter(console);
    port->in_fd = in_fd;
    port->out_fd = out_fd;
    port->is_socket =
        is_connection(port) && fstat(in_fd, &status) == 0 && S_ISSOCK(status.st_mode);
    port->readable = true;
    port->ended = port->hung_up = port->blocked = port->lost = false;
    if (in_fd >= 0)
        result = watch_fd(console, port, EPOLL_CTL_ADD, in_fd, INPUT,
                          EPOLLIN | (is_connection(port) ? EPOLLRDHUP : 0));
    if (result == -EPERM)
        result = 0; /* a file: it never blocks */
    if (result)
        port->in_fd = port->out_fd = -1;
    wake(console, port);
    leave(console);
    return result;
}

void virtio_console_disconnect(struct virtio_console *console, uint32_t number)
{
    struct port *port = &console->ports[number];

    enter(console);
    if (port->blocked)
        await_room(console, port, false);
    if (port->in_fd >= 0)
        epoll_ctl(console->epoll_fd, EPOLL_CTL_DEL, port->in_fd, NULL);
    if (port->has_queues)
        drop_output(console, &port->tx);
    port->in_fd = port->out_fd = -1;
    port->hung_up = port->lost = false;
    wake(console, port);
    leave(console);
}

void virtio_console_set_open(struct virtio_console *console, uint32_t number, bool open)
{
    struct port *port = &console->ports[number];

    enter(console);
    port->open = open;
    check_lost(console, port);
    wake(console, port);
    leave(console);
}

void virtio_console_set_watch(struct virtio_console *console, uint32_t number,
                              struct console_watch *watch)
{
    enter(console);
    console->ports[number].watch = watch;
    leave(console);
}

int virtio_console_take_lost(struct virtio_console *console)
{
    int number = -1;

    enter(console);
    for (uint32_t i = 0; i < console->port_count && number < 0; i++) {
        if (console->ports[i].lost) {
            number = (int)i;
            console->ports[i].lost = false;
        }
    }
    leave(console);
    return number;
}

struct virtio_console_counters virtio_console_counters(struct virtio_console *console)
{
    struct virtio_console_counters counters;

    enter(console);
    counters = console->counters;
    for (uint32_t i = 0; i < console->port_count; i++)
        counters.malformed += console->ports[i].rx.side.vq.malformed +
                              console->ports[i].tx.side.vq.malformed;
    leave(console);
    return counters;
}

/* --- create and destroy --------------------------------------------------------------------- */

struct virtio_console *virtio_console_create(uint32_t port_count, const struct guest_mem *memory,
                                             struct virtio_irq *irq, int news_fd)
{
    struct virtio_console *console =
        calloc(1, sizeof(*console) + port_count * sizeof(console->ports[0]));
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = WAKE};

    if (!console)
        return NULL;
    pthread_mutex_init(&console->lock, NULL);
    console->memory = memory;
    console->irq = irq;
    console->news_fd = news_fd;
    console->port_count = port_count;
    for (uint32_t i = 0; i < port_count; i++)
        console->ports[i].in_fd = console->ports[i].out_fd = -1;
    console->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    console->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    console->list = calloc(port_count, sizeof(*console->list));
    if (console->wake_fd < 0 || console->epoll_fd < 0 || !console->list ||
        epoll_ctl(console->epoll_fd, EPOLL_CTL_ADD, console->wake_fd, &event) < 0) {
        int error = errno;

        virtio_console_destroy(console);
        errno = error;
        return NULL;
    }
    return console;
}

static void free_lane(struct lane *lane)
{
    free(lane->buffers);
    free(lane->iov);
}

void virtio_console_destroy(struct virtio_console *console)
{
    if (!console)
        return;
    for (uint32_t i = 0; i < console->port_count; i++) {
        free_lane(&console->ports[i].rx);
        free_lane(&console->ports[i].tx);
    }
    free(console->list);
    if (console->epoll_fd >= 0)
        close(console->epoll_fd);
    if (console->wake_fd >= 0)
        close(console->wake_fd);
    pthread_mutex_destroy(&console->lock);
    free(console);
}

static int set_lane(struct virtio_console *console, const struct port *port, struct lane *lane,
                    const struct virtq_config *config, int kick_fd)
{
    if (config->size > VIRTIO_CONSOLE_MAX_QUEUE_SIZE ||
        virtq_init(&lane->side.vq, console->memory, config))
        return -EINVAL;
    virtq_disable_notify(&lane->side.vq);
    lane->side.kick_fd = kick_fd;
    /* Room for the longest chain beside others. */
    lane->buffers = malloc(2u * config->size * sizeof(*lane->buffers));
    lane->iov = malloc(2u * config->size * sizeof(*lane->iov));
    if (!lane->buffers || !lane->iov)
        return -ENOMEM;
    return watch_fd(console, port, EPOLL_CTL_ADD, kick_fd, KICK, EPOLLIN);
}

int virtio_console_set_queues(struct virtio_console *console, uint32_t number,
                              const struct virtq_config *rx, int rx_kick,
                              const struct virtq_config *tx, int tx_kick)
{
    struct port *port = &console->ports[number];
    int result = set_lane(console, port, &port->rx, rx, rx_kick);

    if (!result)
        result = set_lane(console, port, &port->tx, tx, tx_kick);
    port->has_queues = !result;
    return result;
}
