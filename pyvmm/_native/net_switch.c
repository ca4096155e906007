#include "net_switch.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net_gso.h"
#include "net_port.h"
#include "worker.h"

#define HEADER sizeof(struct virtio_net_hdr_v1)
#define ETH_SIZE 14
#define MAC_SIZE 6

#define MAX_PORTS 1024
/* Frames that are taken from one port before the next has its turn. */
#define BATCH 32
#define EVENTS_PER_WAIT 32
/* What a port may be behind, beside what its socket holds. */
#define QUEUE_BYTES (4u << 20)
#define SOCKET_BUFFER (4 << 20)
/* A table of one entry for each hash: of two stations that share one, the other's frames go
 * everywhere until it sends again. */
#define STATIONS 4096

struct queued {
    struct queued *next;
    size_t size;
    uint8_t message[];
};

struct port {
    int fd;
    uint32_t index; /* in the switch's list */
    uint32_t offloads;
    bool waiting; /* for room in its socket */
    /* What the frames of the current batch are for it, before they are sent in one call. */
    int pending;
    struct iovec iov[BATCH];
    struct queued *first, **last;
    size_t queued_bytes;
};

struct station {
    uint8_t mac[MAC_SIZE];
    struct port *port; /* NULL: nobody */
};

struct net_switch {
    int epoll_fd;
    int stop_fd;
    int listen_fd;
    uint32_t port_count;
    struct port *ports[MAX_PORTS];
    struct station stations[STATIONS];
    struct net_switch_counters counters;
    struct mmsghdr in[BATCH];
    struct iovec in_iov[BATCH];
    uint8_t (*messages)[NET_MESSAGE_MAX];
};

/* epoll's data for what is no port. */
static char stop_tag, listen_tag;

/* To a port */

static bool watch(struct net_switch *hub, struct port *port, int op)
{
    struct epoll_event event = {
        .events = EPOLLIN | (port->waiting ? (uint32_t)EPOLLOUT : 0),
        .data.ptr = port,
    };
    return epoll_ctl(hub->epoll_fd, op, port->fd, &event) == 0;
}

static void set_waiting(struct net_switch *hub, struct port *port, bool waiting)
{
    if (waiting != port->waiting) {
        port->waiting = waiting;
        watch(hub, port, EPOLL_CTL_MOD);
    }
}

static void enqueue(struct net_switch *hub, struct port *port, const uint8_t *message, size_t size)
{
    struct queued *queued = NULL;

    if (port->queued_bytes + size <= QUEUE_BYTES)
        queued = malloc(sizeof(*queued) + size);
    if (!queued) {
        hub->counters.dropped++;
        return;
    }
    queued->next = NULL;
    queued->size = size;
    memcpy(queued->message, message, size);
    *port->last = queued;
    port->last = &queued->next;
    port->queued_bytes += size;
}

static void dequeue(struct port *port)
{
    struct queued *queued = port->first;

    port->first = queued->next;
    if (!port->first)
        port->last = &port->first;
    port->queued_bytes -= queued->size;
    free(queued);
}

/* How many of the messages the port's socket took. */
static int send_messages(struct port *port, struct iovec *iov, int count)
{
    struct mmsghdr out[BATCH];
    int sent = 0;

    for (int i = 0; i < count; i++)
        out[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &iov[i], .msg_iovlen = 1}};
    while (sent < count) {
        int result = sendmmsg(port->fd, out + sent, (unsigned)(count - sent),
                              MSG_DONTWAIT | MSG_NOSIGNAL);
        if (result < 0 && errno == EINTR)
            continue;
        if (result < 0) {
            if (errno == EAGAIN || errno == ENOBUFS)
                return sent;
            return count; /* it has gone, as epoll will say */
        }
        sent += result;
    }
    return sent;
}

static void send_queue(struct net_switch *hub, struct port *port)
{
    while (port->first) {
        struct iovec iov[BATCH];
        int count = 0;

        for (struct queued *each = port->first; each && count < BATCH; each = each->next)
            iov[count++] = (struct iovec){each->message, each->size};
        int sent = send_messages(port, iov, count);
        for (int i = 0; i < sent; i++)
            dequeue(port);
        if (sent < count)
            break;
    }
    set_waiting(hub, port, port->first != NULL);
}

/* Sends what is pending, or queues what the socket has no room for. */
static void flush(struct net_switch *hub, struct port *port)
{
    int sent = port->first ? 0 : send_messages(port, port->iov, port->pending);

    for (int i = sent; i < port->pending; i++)
        enqueue(hub, port, port->iov[i].iov_base, port->iov[i].iov_len);
    port->pending = 0;
    set_waiting(hub, port, port->first != NULL);
}

struct completion {
    struct net_switch *hub;
    struct port *port;
};

static void emit(void *opaque, const uint8_t *message, size_t size)
{
    struct completion *to = opaque;
    enqueue(to->hub, to->port, message, size);
}

static void deliver(struct net_switch *hub, struct port *port, uint8_t *message, size_t size)
{
    if (net_gso_takes(port->offloads, message)) {
        port->iov[port->pending++] = (struct iovec){message, size};
        return;
    }
    flush(hub, port);
    if (net_gso_complete(message, size, emit, &(struct completion){hub, port}))
        send_queue(hub, port);
    else
        hub->counters.malformed++;
}

/* Stations */

static struct station *station_of(struct net_switch *hub, const uint8_t *mac)
{
    uint32_t hash = 2166136261u; /* FNV-1a */

    for (int i = 0; i < MAC_SIZE; i++)
        hash = (hash ^ mac[i]) * 16777619u;
    return &hub->stations[(hash ^ hash >> 16) % STATIONS];
}

static void learn(struct net_switch *hub, const uint8_t *mac, struct port *port)
{
    struct station *station = station_of(hub, mac);

    memcpy(station->mac, mac, MAC_SIZE);
    station->port = port;
}

static struct port *find(struct net_switch *hub, const uint8_t *mac)
{
    const struct station *station = station_of(hub, mac);

    return station->port && memcmp(station->mac, mac, MAC_SIZE) == 0 ? station->port : NULL;
}

/* From a port */

static void forward(struct net_switch *hub, struct port *from, uint8_t *message, size_t size)
{
    const uint8_t *destination = message + HEADER, *source = destination + MAC_SIZE;

    hub->counters.frames++;
    learn(hub, source, from);
    struct port *to = destination[0] & 1 ? NULL : find(hub, destination);
    if (to) {
        if (to != from)
            deliver(hub, to, message, size);
        return;
    }
    for (uint32_t i = 0; i < hub->port_count; i++) {
        if (hub->ports[i] != from)
            deliver(hub, hub->ports[i], message, size);
    }
}

static void take(struct net_switch *hub, struct port *from, const struct mmsghdr *received,
                 uint8_t *message)
{
    size_t size = received->msg_len;
    uint32_t offloads;

    if (received->msg_hdr.msg_flags & MSG_TRUNC) {
        hub->counters.malformed++;
    } else if (size == sizeof(offloads)) {
        memcpy(&offloads, message, sizeof(offloads));
        from->offloads = le32toh(offloads) & NET_SWITCH_OFFLOADS;
    } else if (size < HEADER + ETH_SIZE || (message[HEADER + MAC_SIZE] & 1)) {
        hub->counters.malformed++; /* too short, or from a group of stations */
    } else {
        forward(hub, from, message, size);
    }
}

/* False when the port has gone. */
static bool receive(struct net_switch *hub, struct port *from)
{
    int count = recvmmsg(from->fd, hub->in, BATCH, MSG_DONTWAIT, NULL);
    bool open = true;

    if (count < 0)
        return errno == EAGAIN || errno == EINTR || errno == ENOBUFS;
    for (int i = 0; i < count && open; i++) {
        open = hub->in[i].msg_len > 0; /* nobody sends an empty message: it is the end */
        if (open)
            take(hub, from, &hub->in[i], hub->messages[i]);
    }
    for (uint32_t i = 0; i < hub->port_count; i++)
        flush(hub, hub->ports[i]);
    return open;
}

/* Ports */

int net_switch_add(struct net_switch *hub, int fd)
{
    int size = SOCKET_BUFFER;

    if (hub->port_count == MAX_PORTS)
        return -EMFILE;
    struct port *port = calloc(1, sizeof(*port));
    if (!port)
        return -ENOMEM;
    port->fd = fd;
    port->last = &port->first;
    port->index = hub->port_count;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)); /* as much of it as is allowed */
    if (!watch(hub, port, EPOLL_CTL_ADD)) {
        int error = errno;
        free(port);
        return -error;
    }
    hub->ports[hub->port_count++] = port;
    hub->counters.ports = hub->port_count;
    return 0;
}

static void remove_port(struct net_switch *hub, struct port *port)
{
    for (int i = 0; i < STATIONS; i++) {
        if (hub->stations[i].port == port)
            hub->stations[i].port = NULL;
    }
    hub->ports[port->index] = hub->ports[--hub->port_count];
    hub->ports[port->index]->index = port->index;
    hub->counters.ports = hub->port_count;
    while (port->first)
        dequeue(port);
    close(port->fd);
    free(port);
}

static void accept_ports(struct net_switch *hub)
{
    int fd;

    while ((fd = accept4(hub->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
        if (net_switch_add(hub, fd) < 0)
            close(fd);
    }
    if (errno == EMFILE || errno == ENFILE)
        poll(NULL, 0, 10); /* the caller stays where it is, and is here again at once */
}

/* The switch */

int net_switch_run(struct net_switch *hub, bool until_empty)
{
    struct epoll_event events[EVENTS_PER_WAIT];

    while (!until_empty || hub->port_count > 0) {
        int count = epoll_wait(hub->epoll_fd, events, EVENTS_PER_WAIT, -1);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        /* First who has come, to get all that was sent since. */
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &listen_tag)
                accept_ports(hub);
        }
        for (int i = 0; i < count; i++) {
            struct port *port = events[i].data.ptr;

            if (events[i].data.ptr == &stop_tag) {
                eventfd_take(hub->stop_fd);
                return NET_SWITCH_STOPPED;
            }
            if (events[i].data.ptr == &listen_tag)
                continue;
            if (events[i].events & EPOLLOUT)
                send_queue(hub, port);
            if ((events[i].events & ~(uint32_t)EPOLLOUT) && !receive(hub, port))
                remove_port(hub, port); /* each port is in `events` once */
        }
    }
    return NET_SWITCH_EMPTY;
}

void net_switch_stop(struct net_switch *hub)
{
    eventfd_signal(hub->stop_fd);
}

struct net_switch *net_switch_create(int listen_fd)
{
    struct net_switch *hub = calloc(1, sizeof(*hub));

    if (!hub)
        return NULL;
    hub->listen_fd = listen_fd;
    hub->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    hub->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    hub->messages = malloc(BATCH * sizeof(*hub->messages));
    struct epoll_event stop = {.events = EPOLLIN, .data.ptr = &stop_tag};
    struct epoll_event listening = {.events = EPOLLIN, .data.ptr = &listen_tag};
    if (hub->epoll_fd < 0 || hub->stop_fd < 0 || !hub->messages ||
        epoll_ctl(hub->epoll_fd, EPOLL_CTL_ADD, hub->stop_fd, &stop) < 0 ||
        epoll_ctl(hub->epoll_fd, EPOLL_CTL_ADD, listen_fd, &listening) < 0) {
        int error = errno;
        net_switch_destroy(hub);
        errno = error;
        return NULL;
    }
    for (int i = 0; i < BATCH; i++) {
        hub->in_iov[i] = (struct iovec){hub->messages[i], sizeof(hub->messages[i])};
        hub->in[i].msg_hdr = (struct msghdr){.msg_iov = &hub->in_iov[i], .msg_iovlen = 1};
    }
    return hub;
}

void net_switch_destroy(struct net_switch *hub)
{
    if (!hub)
        return;
    while (hub->port_count > 0)
        remove_port(hub, hub->ports[0]);
    if (hub->epoll_fd >= 0)
        close(hub->epoll_fd);
    if (hub->stop_fd >= 0)
        close(hub->stop_fd);
    free(hub->messages);
    free(hub);
}

struct net_switch_counters net_switch_counters(const struct net_switch *hub)
{
    return hub->counters;
}
