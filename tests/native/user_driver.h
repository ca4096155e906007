/* A guest of the user network, and a socket of the host: datagrams from one to the other. */
#ifndef PYVMM_TESTS_USER_DRIVER_H
#define PYVMM_TESTS_USER_DRIVER_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/socket.h>

#include "net_driver.h"
#include "slirp_net.h"

#define HOST 0x0A000202u
#define GUEST 0x0A00020Fu
#define GUEST_PORT 4000u
#define PAYLOAD_AT (NET_HEADER + 14 + 20 + 8)

static const uint8_t guest_mac[6] = {0x52, 0x54, 0, 0x12, 0x34, 0x56};

struct user {
    struct slirp_net *net;
    struct net_driver driver;
    int socket; /* of the host */
    uint16_t port;
};

static inline void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

static inline void ethernet(uint8_t *frame, uint32_t type)
{
    memset(frame, 0xFF, 6);
    memcpy(frame + 6, guest_mac, 6);
    put16(frame + 12, type);
}

/* The guest says who it is, as it does before it sends anything. Returns the size. */
static inline uint32_t put_arp(uint8_t *frame)
{
    ethernet(frame, 0x0806);
    memset(frame + 14, 0, 28);
    put16(frame + 14, 1);
    put16(frame + 16, 0x0800);
    frame[18] = 6;
    frame[19] = 4;
    put16(frame + 20, 1);
    memcpy(frame + 22, guest_mac, 6);
    put32(frame + 28, GUEST);
    put32(frame + 38, HOST);
    return 42;
}

/* A datagram of `size` bytes that begins with `number`, for `port` of the host. */
static inline uint32_t put_datagram(uint8_t *frame, uint16_t port, uint32_t number, uint32_t size)
{
    uint8_t *ip = frame + 14, *udp = ip + 20;
    uint32_t sum = 0;

    ethernet(frame, 0x0800);
    memset(ip, 0, 28);
    put16(ip, 0x4500);
    put16(ip + 2, 28 + size);
    put16(ip + 8, 64 << 8 | IPPROTO_UDP);
    put32(ip + 12, GUEST);
    put32(ip + 16, HOST);
    for (unsigned i = 0; i < 20; i += 2)
        sum += (uint32_t)ip[i] << 8 | ip[i + 1];
    put16(ip + 10, ~(sum + (sum >> 16)));
    put16(udp, GUEST_PORT);
    put16(udp + 2, port);
    put16(udp + 4, 8 + size);
    memset(udp + 8, 0, size);
    put32(udp + 8, number);
    return 42 + size;
}

static inline void user_create(struct user *user)
{
    const struct slirp_net_config config = {
        .network = HOST & ~0xFFu,
        .netmask = 0xFFFFFF00u,
        .host = HOST,
        .name_server = HOST + 1,
        .guest = GUEST,
        .mtu = 1500,
        .host_loopback = true,
    };
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof(address);

    user->socket = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(bind(user->socket, (struct sockaddr *)&address, size) == 0);
    CHECK(getsockname(user->socket, (struct sockaddr *)&address, &size) == 0);
    user->port = ntohs(address.sin_port);
    user->net = slirp_net_create(&config);
    CHECK(user->net);
    net_driver_create(&user->driver, -1, NET_FRAMING_CALLS, false);
    user->driver.device.engine = slirp_net_engine(user->net);
    net_filter_init(&user->driver.device.filter, guest_mac, false);
    net_driver_start(&user->driver);
}

static inline void user_destroy(struct user *user)
{
    CHECK(net_driver_stop(&user->driver) == VIRTIO_NET_STOPPED);
    net_driver_destroy(&user->driver);
    slirp_net_destroy(user->net);
    close(user->socket);
}

static inline uint8_t *tx_frame(struct user *user, uint16_t id)
{
    uint8_t *buffer = user->driver.ring[1].buffers + (size_t)id * NET_BUFFER;

    memset(buffer, 0, NET_HEADER);
    return buffer + NET_HEADER;
}

static inline void offer_frame(struct user *user, uint16_t id, uint32_t size)
{
    struct net_ring *ring = &user->driver.ring[1];

    ring->desc[id].len = NET_HEADER + size;
    net_ring_offer(ring, id);
}

static inline const struct vring_used_elem *await(struct net_ring *ring)
{
    const struct vring_used_elem *element;

    while (!(element = net_ring_collect(ring)))
        sched_yield();
    return element;
}

/* Sends and takes the frame back. */
static inline void send_frame(struct user *user, uint16_t id, uint32_t size)
{
    offer_frame(user, id, size);
    net_ring_publish(&user->driver.ring[1]);
    CHECK(await(&user->driver.ring[1])->id == id);
}

/* The next frame for the guest, whose buffer is offered again. */
static inline const uint8_t *receive(struct user *user, uint32_t *size)
{
    static uint8_t frame[NET_BUFFER];
    struct net_ring *ring = &user->driver.ring[0];
    const struct vring_used_elem *element = await(ring);

    *size = element->len - NET_HEADER;
    memcpy(frame, ring->buffers + (size_t)element->id * NET_BUFFER, element->len);
    net_ring_offer(ring, (uint16_t)element->id);
    net_ring_publish(ring);
    return frame;
}

static inline void introduce(struct user *user)
{
    uint32_t size;
    const uint8_t *answer;

    send_frame(user, 0, put_arp(tx_frame(user, 0)));
    answer = receive(user, &size) + NET_HEADER;
    CHECK(size >= 42 && answer[12] == 0x08 && answer[13] == 0x06 && answer[21] == 2);
}

#endif
