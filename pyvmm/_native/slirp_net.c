#include "slirp_net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/ethernet.h>
#include <slirp/libslirp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* An Ethernet header and the longest IP packet there is. */
#define FRAME_MAX (ETH_HLEN + 65535)

/* The queue of frames that the guest has no room for. One event of a socket brings at most the send
 * buffer of one connection, 128 KiB, and no further event is taken before the queue is empty; but a
 * tick of the stack's clock may have it send a segment of each connection again. */
#define QUEUE_FRAMES 1024
#define QUEUE_BYTES (4u << 20)

/* More than a DHCP message takes. */
#define DHCP_MAX 1500

/* A forwarded port's backlog; libslirp's own, of 1, makes clients that come together wait for
 * retransmissions. */
#define BACKLOG 128

struct timer {
    struct timer *next;
    SlirpTimerCb expired;
    void *opaque;
    int64_t expires; /* ms; INT64_MAX: not set */
};

/* A socket that the stack wants to be polled. */
struct wanted {
    int fd;
    uint32_t events; /* EPOLL... */
    uint32_t ready;
};

/* What is known of a descriptor. */
struct watch {
    bool added;      /* to the epoll set */
    uint32_t events; /* there */
    int index;       /* in `wanted`, or -1 */
};

struct slirp_net {
    struct net_engine engine;
    Slirp *slirp;
    uint16_t mtu;
    struct timer *timers;
    struct slirp_net_counters counters;

    int epoll_fd;
    net_deliver deliver;
    void *deliver_to;

    /* By descriptor. The set in the kernel is changed only where it differs from what is wanted. */
    struct watch *watches;
    int watch_count;
    /* In the order in which the stack asked: now, and the time before. */
    struct wanted *wanted, *earlier;
    int wanted_count, wanted_capacity, earlier_count, earlier_capacity;
    /* Sockets get their turn by index. A full queue ends a round early, at `cut` (or -1); the next
     * one then starts there, at `first`, so that no socket is always the one that is left out. */
    int first, cut;

    uint8_t in[FRAME_MAX]; /* a frame of the guest, out of its reach */

    /* To the guest: frames for which it had no room. */
    int queued, sent;
    size_t queue_bytes;
    struct iovec queue[QUEUE_FRAMES];
    uint8_t *queue_memory;
};

static int64_t now_ns(void *opaque)
{
    struct timespec time;

    (void)opaque;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int64_t now_ms(void)
{
    return now_ns(NULL) / 1000000;
}

/* To the guest */

static bool is_blocked(const struct slirp_net *net)
{
    return net->queued > 0;
}

static void flush(struct slirp_net *net)
{
    while (net->sent < net->queued) {
        const struct iovec *frame = &net->queue[net->sent];

        if (!net->deliver(net->deliver_to, frame->iov_base, frame->iov_len))
            return;
        net->sent++;
    }
    net->queued = net->sent = 0;
    net->queue_bytes = 0;
}

/* libslirp's DHCP server has no option for the MTU, which guests without VIRTIO_NET_F_MTU learn of
 * in no other way: put in behind those that it gives, into the padding of the message (RFC 2131,
 * 2132). Returns the frame to send, which is `frame` itself if that is no answer of the server. */
static const void *add_dhcp_mtu(const struct slirp_net *net, const uint8_t *frame, size_t size,
                                uint8_t changed[DHCP_MAX])
{
    enum { IP = ETH_HLEN, UDP = IP + 20, OPTIONS = UDP + 8 + 240 };
    enum { OPTION_PAD = 0, OPTION_MTU = 26, OPTION_END = 255 };
    const uint8_t server_port[] = {0, 67};
    const uint8_t option[] = {OPTION_MTU, 2, net->mtu >> 8, net->mtu & 0xff, OPTION_END};
    size_t at = OPTIONS;

    if (size < OPTIONS || size > DHCP_MAX || frame[12] != 0x08 || frame[13] != 0x00 ||
        frame[IP] != 0x45 || frame[IP + 9] != IPPROTO_UDP ||
        memcmp(frame + UDP, server_port, sizeof(server_port)) != 0)
        return frame;
    while (at + 1 < size && frame[at] != OPTION_END)
        at += frame[at] == OPTION_PAD ? 1 : 2u + frame[at + 1];
    if (at + sizeof(option) > size)
        return frame;
    memcpy(changed, frame, size);
    memcpy(changed + at, option, sizeof(option));
    memset(changed + UDP + 6, 0, 2); /* the checksum: none (RFC 768) */
    return changed;
}

static void enqueue(struct slirp_net *net, const void *frame, size_t size)
{
    if (net->queued == QUEUE_FRAMES || size > QUEUE_BYTES - net->queue_bytes) {
        net->counters.dropped++;
        return;
    }
    uint8_t *place = net->queue_memory + net->queue_bytes;
    memcpy(place, frame, size);
    net->queue_bytes += size;
    net->queue[net->queued++] = (struct iovec){place, size};
}

static ssize_t send_packet(const void *frame, size_t size, void *opaque)
{
    struct slirp_net *net = opaque;
    uint8_t changed[DHCP_MAX];

    net->counters.to_guest++;
    frame = add_dhcp_mtu(net, frame, size, changed);
    if (is_blocked(net) || !net->deliver(net->deliver_to, frame, size))
        enqueue(net, frame, size);
    return (ssize_t)size;
}

/* From the guest */

static bool is_acceptable(const uint8_t *frame)
{
    uint16_t type = (uint16_t)(frame[12] << 8 | frame[13]);
    return type == ETHERTYPE_ARP || type == ETHERTYPE_IP || type == ETHERTYPE_IPV6;
}

static bool take(struct net_engine *engine, const struct iovec *iov, uint32_t count,
                 uint32_t bytes)
{
    struct slirp_net *net = (struct slirp_net *)engine;
    uint8_t *end = net->in;

    if (is_blocked(net))
        return false;
    net->counters.from_guest++;
    if (bytes < ETH_HLEN || bytes > FRAME_MAX) {
        net->counters.malformed++;
        return true;
    }
    for (uint32_t i = 0; i < count; i++) {
        memcpy(end, iov[i].iov_base, iov[i].iov_len);
        end += iov[i].iov_len;
    }
    if (is_acceptable(net->in))
        slirp_input(net->slirp, net->in, (int)bytes);
    else
        net->counters.malformed++;
    return true;
}

/* The stack's timers and sockets */

static void *timer_new(SlirpTimerCb expired, void *timer_opaque, void *opaque)
{
    struct slirp_net *net = opaque;
    struct timer *timer = malloc(sizeof(*timer));

    if (!timer)
        abort(); /* as the stack does when it has no memory */
    *timer = (struct timer){net->timers, expired, timer_opaque, INT64_MAX};
    net->timers = timer;
    return timer;
}

static void timer_free(void *timer, void *opaque)
{
    struct slirp_net *net = opaque;

    for (struct timer **link = &net->timers; *link; link = &(*link)->next) {
        if (*link == timer) {
            *link = (*link)->next;
            free(timer);
            return;
        }
    }
}

static void timer_mod(void *timer, int64_t expires, void *opaque)
{
    (void)opaque;
    ((struct timer *)timer)->expires = expires;
}

static void run_timers(struct slirp_net *net)
{
    int64_t now = now_ms();

    for (struct timer *timer = net->timers, *next; timer; timer = next) {
        next = timer->next;
        if (timer->expires <= now) {
            timer->expires = INT64_MAX;
            timer->expired(timer->opaque);
        }
    }
}

static int timeout_ms(const struct slirp_net *net, uint32_t stack_wants)
{
    int64_t now = now_ms(), least = stack_wants == UINT32_MAX ? INT32_MAX : stack_wants;
    bool forever = stack_wants == UINT32_MAX;

    for (const struct timer *timer = net->timers; timer; timer = timer->next) {
        if (timer->expires != INT64_MAX) {
            forever = false;
            if (timer->expires - now < least)
                least = timer->expires - now;
        }
    }
    return forever ? -1 : least < 0 ? 0 : (int)least;
}

static void guest_error(const char *message, void *opaque)
{
    (void)message, (void)opaque; /* a guest does not get to fill the terminal */
}

/* A new descriptor, or one that is about to be closed: the kernel forgets it by itself. */
static void forget_fd(int fd, void *opaque)
{
    struct slirp_net *net = opaque;

    if (fd >= 0 && fd < net->watch_count)
        net->watches[fd] = (struct watch){.index = -1};
}

static void ignore_notify(void *opaque)
{
    (void)opaque; /* comes from our own thread only, which polls next anyway */
}

static const SlirpCb callbacks = {
    .send_packet = send_packet,
    .guest_error = guest_error,
    .clock_get_ns = now_ns,
    .timer_new = timer_new,
    .timer_free = timer_free,
    .timer_mod = timer_mod,
    .register_poll_fd = forget_fd,
    .unregister_poll_fd = forget_fd,
    .notify = ignore_notify,
};

static const struct {
    int slirp;
    uint32_t epoll;
} event_bits[] = {
    {SLIRP_POLL_IN, EPOLLIN},   {SLIRP_POLL_OUT, EPOLLOUT}, {SLIRP_POLL_PRI, EPOLLPRI},
    {SLIRP_POLL_ERR, EPOLLERR}, {SLIRP_POLL_HUP, EPOLLHUP},
};
#define EVENT_BITS (sizeof(event_bits) / sizeof(event_bits[0]))

static int add_poll(int fd, int events, void *opaque)
{
    struct slirp_net *net = opaque;
    uint32_t epoll_events = 0;

    if (net->wanted_count == net->wanted_capacity) {
        int capacity = net->wanted_capacity ? net->wanted_capacity * 2 : 64;
        struct wanted *larger = realloc(net->wanted, (size_t)capacity * sizeof(*larger));
        if (!larger)
            abort();
        net->wanted = larger;
        net->wanted_capacity = capacity;
    }
    for (size_t i = 0; i < EVENT_BITS; i++) {
        if (events & event_bits[i].slirp)
            epoll_events |= event_bits[i].epoll;
    }
    net->wanted[net->wanted_count] = (struct wanted){.fd = fd, .events = epoll_events};
    return net->wanted_count++;
}

static int get_revents(int index, void *opaque)
{
    struct slirp_net *net = opaque;
    int events = 0;

    if (is_blocked(net)) {
        if (net->cut < 0)
            net->cut = index;
        return 0; /* it will still be ready when there is room */
    }
    if (index < net->first || index >= net->wanted_count)
        return 0;
    for (size_t i = 0; i < EVENT_BITS; i++) {
        if (net->wanted[index].ready & event_bits[i].epoll)
            events |= event_bits[i].slirp;
    }
    return events;
}

/* Asks the stack what it wants to be polled. */
static uint32_t fill_wanted(struct slirp_net *net)
{
    uint32_t timeout = UINT32_MAX;

    net->wanted_count = 0;
    slirp_pollfds_fill(net->slirp, &timeout, add_poll, net);
    return timeout;
}

static struct watch *watch_of(struct slirp_net *net, int fd)
{
    if (fd >= net->watch_count) {
        int count = fd + 64;
        struct watch *larger = realloc(net->watches, (size_t)count * sizeof(*larger));
        if (!larger)
            abort(); /* as the stack does when it has no memory */
        for (int i = net->watch_count; i < count; i++)
            larger[i] = (struct watch){.index = -1};
        net->watches = larger;
        net->watch_count = count;
    }
    return &net->watches[fd];
}

static void set_events(struct slirp_net *net, int fd, uint32_t events)
{
    struct watch *watch = &net->watches[fd];
    /* Without any, errors would still be told, again and again: EPOLLET makes that once. */
    struct epoll_event event = {.events = events ? events : (uint32_t)EPOLLET,
                                .data.u64 = NET_ENGINE_EVENT(fd)};

    if (watch->added && watch->events == events)
        return;
    if (epoll_ctl(net->epoll_fd, watch->added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) == 0) {
        watch->added = true;
        watch->events = events;
    }
}

/* The engine */

static void attach(struct net_engine *engine, int epoll_fd, net_deliver deliver, void *opaque)
{
    struct slirp_net *net = (struct slirp_net *)engine;

    net->epoll_fd = epoll_fd;
    net->deliver = deliver;
    net->deliver_to = opaque;
    net->wanted_count = net->earlier_count = 0;
    for (int fd = 0; fd < net->watch_count; fd++)
        net->watches[fd] = (struct watch){.index = -1};
}

static bool deliver_later(void *opaque, const void *frame, size_t size)
{
    (void)opaque, (void)frame, (void)size;
    return false;
}

static void detach(struct net_engine *engine)
{
    struct slirp_net *net = (struct slirp_net *)engine;

    net->deliver = deliver_later;
}

static int prepare(struct net_engine *engine)
{
    struct slirp_net *net = (struct slirp_net *)engine;
    struct wanted *earlier = net->wanted;
    int capacity = net->wanted_capacity, timeout = -1;

    net->wanted = net->earlier;
    net->wanted_capacity = net->earlier_capacity;
    net->earlier = earlier;
    net->earlier_capacity = capacity;
    net->earlier_count = net->wanted_count;
    for (int i = 0; i < net->earlier_count; i++)
        watch_of(net, net->earlier[i].fd)->index = -1;

    net->wanted_count = 0;
    if (!is_blocked(net))
        timeout = timeout_ms(net, fill_wanted(net));
    for (int i = 0; i < net->wanted_count; i++) {
        struct wanted *wanted = &net->wanted[i];

        watch_of(net, wanted->fd)->index = i;
        set_events(net, wanted->fd, wanted->events);
    }
    for (int i = 0; i < net->earlier_count; i++) {
        int fd = net->earlier[i].fd;

        if (net->watches[fd].index < 0 && net->watches[fd].added)
            set_events(net, fd, 0);
    }
    return timeout;
}

static void ready(struct net_engine *engine, int fd, uint32_t events)
{
    struct slirp_net *net = (struct slirp_net *)engine;

    if (fd < net->watch_count && net->watches[fd].index >= 0)
        net->wanted[net->watches[fd].index].ready = events;
}

static void serve(struct net_engine *engine)
{
    struct slirp_net *net = (struct slirp_net *)engine;

    flush(net);
    if (is_blocked(net))
        return;
    net->cut = -1;
    slirp_pollfds_poll(net->slirp, false, get_revents, net);
    net->first = net->cut < 0 ? 0 : net->cut;
    run_timers(net);
}

struct net_engine *slirp_net_engine(struct slirp_net *net)
{
    return &net->engine;
}

/* Forwarded ports */

/* The socket of the port that was forwarded last, which libslirp does not tell: of those that the
 * stack polls, the one that `known` has not. */
static int newest_socket(struct slirp_net *net, const struct wanted *known, int known_count)
{
    fill_wanted(net);
    for (int i = 0; i < net->wanted_count; i++) {
        int j = 0;
        while (j < known_count && known[j].fd != net->wanted[i].fd)
            j++;
        if (j == known_count)
            return net->wanted[i].fd;
    }
    return -1;
}

int slirp_net_forward(struct slirp_net *net, bool udp, uint32_t host, uint16_t host_port,
                      uint32_t guest, uint16_t guest_port)
{
    struct in_addr host_addr = {htonl(host)}, guest_addr = {htonl(guest)};
    struct sockaddr_in bound;
    socklen_t size = sizeof(bound);

    fill_wanted(net);
    int known_count = net->wanted_count;
    struct wanted *known = malloc((size_t)(known_count + 1) * sizeof(*known));
    if (!known)
        return -ENOMEM;
    if (known_count > 0)
        memcpy(known, net->wanted, (size_t)known_count * sizeof(*known));

    int result = 0;
    errno = 0;
    if (slirp_add_hostfwd(net->slirp, udp, host_addr, host_port, guest_addr, guest_port) < 0) {
        result = errno ? -errno : -EINVAL;
    } else {
        int fd = newest_socket(net, known, known_count);
        if (fd < 0 || getsockname(fd, (struct sockaddr *)&bound, &size) < 0 ||
            (!udp && listen(fd, BACKLOG) < 0))
            result = errno ? -errno : -EIO;
        else
            result = ntohs(bound.sin_port);
    }
    free(known);
    return result;
}

/* Create and destroy */

struct slirp_net *slirp_net_create(const struct slirp_net_config *config)
{
    struct slirp_net *net = calloc(1, sizeof(*net));

    if (!net)
        return NULL;
    net->engine = (struct net_engine){
        .attach = attach,
        .detach = detach,
        .take = take,
        .prepare = prepare,
        .ready = ready,
        .serve = serve,
    };
    net->mtu = config->mtu;
    net->deliver = deliver_later;
    net->queue_memory = malloc(QUEUE_BYTES);
    if (!net->queue_memory)
        goto failed;

    SlirpConfig slirp_config = {
        .version = 1,
        .restricted = config->restricted,
        .in_enabled = true,
        .vnetwork = {htonl(config->network)},
        .vnetmask = {htonl(config->netmask)},
        .vhost = {htonl(config->host)},
        .in6_enabled = config->ipv6,
        .vprefix_len = 64,
        .vhostname = config->hostname,
        .vdhcp_start = {htonl(config->guest)},
        .vnameserver = {htonl(config->name_server)},
        .if_mtu = config->mtu,
        .if_mru = config->mtu,
        .disable_host_loopback = !config->host_loopback,
    };
    inet_pton(AF_INET6, "fec0::", &slirp_config.vprefix_addr6);
    inet_pton(AF_INET6, "fec0::2", &slirp_config.vhost6);
    inet_pton(AF_INET6, "fec0::3", &slirp_config.vnameserver6);
    errno = EINVAL; /* the only way in which slirp_new fails */
    net->slirp = slirp_new(&slirp_config, &callbacks, net);
    if (!net->slirp)
        goto failed;
    return net;

failed:;
    int error = errno;
    slirp_net_destroy(net);
    errno = error;
    return NULL;
}

void slirp_net_destroy(struct slirp_net *net)
{
    if (!net)
        return;
    if (net->slirp)
        slirp_cleanup(net->slirp);
    free(net->queue_memory);
    free(net->earlier);
    free(net->wanted);
    free(net->watches);
    free(net);
}

struct slirp_net_counters slirp_net_counters(const struct slirp_net *net)
{
    return net->counters;
}
