/* The user network behind the network device, with a socket of the host as its peer: datagrams there
 * and back, a driver without buffers, and frames that make no sense.
 *
 *   test_user_net          the tests
 *   test_user_net FRAMES   how long so many datagrams of 64 bytes take to the host */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <time.h>

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

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

static void ethernet(uint8_t *frame, uint32_t type)
{
    memset(frame, 0xFF, 6);
    memcpy(frame + 6, guest_mac, 6);
    put16(frame + 12, type);
}

/* The guest says who it is, as it does before it sends anything. Returns the size. */
static uint32_t put_arp(uint8_t *frame)
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
static uint32_t put_datagram(uint8_t *frame, uint16_t port, uint32_t number, uint32_t size)
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

static void user_create(struct user *user)
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

static void user_destroy(struct user *user)
{
    CHECK(net_driver_stop(&user->driver) == VIRTIO_NET_STOPPED);
    net_driver_destroy(&user->driver);
    slirp_net_destroy(user->net);
    close(user->socket);
}

static uint8_t *tx_frame(struct user *user, uint16_t id)
{
    uint8_t *buffer = user->driver.ring[1].buffers + (size_t)id * NET_BUFFER;

    memset(buffer, 0, NET_HEADER);
    return buffer + NET_HEADER;
}

static void offer_frame(struct user *user, uint16_t id, uint32_t size)
{
    struct net_ring *ring = &user->driver.ring[1];

    ring->desc[id].len = NET_HEADER + size;
    net_ring_offer(ring, id);
}

static const struct vring_used_elem *await(struct net_ring *ring)
{
    const struct vring_used_elem *element;

    while (!(element = net_ring_collect(ring)))
        sched_yield();
    return element;
}

/* Sends and takes the frame back. */
static void send_frame(struct user *user, uint16_t id, uint32_t size)
{
    offer_frame(user, id, size);
    net_ring_publish(&user->driver.ring[1]);
    CHECK(await(&user->driver.ring[1])->id == id);
}

/* The next frame for the guest, whose buffer is offered again. */
static const uint8_t *receive(struct user *user, uint32_t *size)
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

static void introduce(struct user *user)
{
    uint32_t size;
    const uint8_t *answer;

    send_frame(user, 0, put_arp(tx_frame(user, 0)));
    answer = receive(user, &size) + NET_HEADER;
    CHECK(size >= 42 && answer[12] == 0x08 && answer[13] == 0x06 && answer[21] == 2);
}

/* Takes datagram `number` and sends it back; where its sender is afterwards known. */
static void echo(struct user *user, uint32_t number, struct sockaddr_in *sender)
{
    uint8_t data[64];
    socklen_t size = sizeof(*sender);

    CHECK(recvfrom(user->socket, data, sizeof(data), 0, (struct sockaddr *)sender, &size) == 64);
    CHECK(((uint32_t)data[2] << 8 | data[3]) == number);
    CHECK(sendto(user->socket, data, sizeof(data), 0, (struct sockaddr *)sender, size) == 64);
}

static void check_answer(struct user *user, uint32_t number)
{
    uint32_t size;
    const uint8_t *frame = receive(user, &size);

    CHECK(size == 42 + 64 && frame[NET_HEADER + 23] == IPPROTO_UDP);
    CHECK(((uint32_t)frame[PAYLOAD_AT + 2] << 8 | frame[PAYLOAD_AT + 3]) == number);
}

static void test_there_and_back(void)
{
    struct user user;
    struct sockaddr_in sender;

    user_create(&user);
    net_driver_fill(&user.driver);
    introduce(&user);
    for (uint32_t number = 0; number < 1000; number++) {
        uint16_t id = number % NET_QUEUE_SIZE;

        send_frame(&user, id, put_datagram(tx_frame(&user, id), user.port, number, 64));
        echo(&user, number, &sender);
        check_answer(&user, number);
    }
    CHECK(slirp_net_counters(user.net).from_guest == 1001);
    user_destroy(&user);
}

/* What comes while the driver has no buffers waits for them, in order, and while it does, no frame
 * of the driver is taken, and no socket read. A device that is stopped meanwhile goes on with it. */
static void test_without_buffers(void)
{
    struct user user;
    struct sockaddr_in sender;
    struct net_ring *rx;
    uint8_t data[64] = {0};

    user_create(&user);
    rx = &user.driver.ring[0];
    net_ring_offer(rx, 0);
    net_ring_publish(rx);
    introduce(&user); /* one buffer */
    send_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 0, 64));
    echo(&user, 0, &sender); /* takes the buffer */
    for (uint32_t number = 1; number < 100; number++) {
        put32(data, number);
        CHECK(sendto(user.socket, data, 64, 0, (struct sockaddr *)&sender, sizeof(sender)) == 64);
    }
    offer_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 100, 64));
    while (slirp_net_counters(user.net).to_guest < 3) { /* with the ARP reply: it has no buffer */
        struct timespec moment = {0, 1000000};

        nanosleep(&moment, NULL);
    }
    net_ring_publish(&user.driver.ring[1]);
    struct pollfd readable = {user.socket, POLLIN, 0};
    CHECK(poll(&readable, 1, 50) == 0 && !net_ring_collect(&user.driver.ring[1]));
    CHECK(net_driver_stop(&user.driver) == VIRTIO_NET_STOPPED);
    net_driver_start(&user.driver);
    for (uint16_t id = 1; id < NET_QUEUE_SIZE; id++)
        net_ring_offer(rx, id);
    net_ring_publish(rx);
    for (uint32_t number = 0; number < 100; number++)
        check_answer(&user, number);
    CHECK(await(&user.driver.ring[1])->id == 0);
    echo(&user, 100, &sender);
    check_answer(&user, 100);
    CHECK(slirp_net_counters(user.net).dropped == 0);
    user_destroy(&user);
}

/* Headers of which some bytes are wrong, and lengths that do not agree with them. */
static void test_hostile_frames(void)
{
    struct user user;
    struct sockaddr_in sender;
    uint64_t state = 1;

    user_create(&user);
    for (unsigned i = 0; i < 20000; i++) {
        uint16_t id = i % NET_QUEUE_SIZE;
        uint8_t *frame = tx_frame(&user, id);
        uint32_t size = i % 3 ? put_datagram(frame, user.port, i, i % 100) : put_arp(frame);
        const struct vring_used_elem *element;

        for (unsigned wrong = 0; wrong < 4; wrong++) {
            uint32_t at;

            state = state * 6364136223846793005u + 1442695040888963407u;
            at = 12 + (uint32_t)(state >> 40) % (size - 12);
            if (at < 30 || at >= 34) /* nothing goes to another machine */
                frame[at] = (uint8_t)(state >> 33);
        }
        send_frame(&user, id, (state >> 60) ? size : 14 + (uint32_t)(state >> 33) % (size - 13));
        while ((element = net_ring_collect(&user.driver.ring[0])))
            net_ring_offer(&user.driver.ring[0], (uint16_t)element->id);
        if (i == 0)
            net_driver_fill(&user.driver);
        net_ring_publish(&user.driver.ring[0]);
        while (recv(user.socket, (uint8_t[200]){0}, 200, MSG_DONTWAIT) > 0)
            ;
    }
    send_frame(&user, 0, put_datagram(tx_frame(&user, 0), user.port, 7, 64));
    do {
        uint8_t data[200];
        socklen_t size = sizeof(sender);
        ssize_t got = recvfrom(user.socket, data, sizeof(data), 0, (struct sockaddr *)&sender, &size);

        if (got == 64 && data[3] == 7)
            break;
    } while (true);
    user_destroy(&user);
}

static void flood(uint32_t frames)
{
    struct user user;
    struct net_ring *tx = &user.driver.ring[1];
    uint32_t sent = 0, returned = 0;
    struct timespec began, ended;

    user_create(&user);
    net_driver_fill(&user.driver);
    introduce(&user);
    for (uint16_t id = 0; id < NET_QUEUE_SIZE; id++)
        put_datagram(tx_frame(&user, id), user.port, id, 64);
    clock_gettime(CLOCK_MONOTONIC, &began);
    while (returned < frames) {
        while (sent < frames && sent - returned < NET_QUEUE_SIZE)
            offer_frame(&user, (uint16_t)(sent++ % NET_QUEUE_SIZE), 42 + 64);
        net_ring_publish(tx);
        await(tx);
        for (returned++; net_ring_collect(tx); returned++)
            ;
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%u datagrams of 64 bytes: %.0f ns each\n", frames,
           ((double)(ended.tv_sec - began.tv_sec) * 1e9 + (double)(ended.tv_nsec - began.tv_nsec)) /
               frames);
    user_destroy(&user);
}

int main(int argc, char **argv)
{
    if (argc == 2) {
        flood((uint32_t)strtoul(argv[1], NULL, 10));
        return 0;
    }
    test_there_and_back();
    test_without_buffers();
    test_hostile_frames();
    return 0;
}
