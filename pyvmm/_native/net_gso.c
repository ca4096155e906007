#include "net_gso.h"

#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <string.h>

#include "net_port.h"

#define HEADER sizeof(struct virtio_net_hdr_v1)
#define ETH_SIZE 14
#define TCP_SIZE 20
/* More frames are made of no message: 64 KiB of the least segments that Linux sends are 744. */
#define MAX_SEGMENTS 1024

enum { TCP_FIN = 0x01, TCP_PSH = 0x08, TCP_CWR = 0x80 };

static uint16_t get16(const uint8_t *p)
{
    return (uint16_t)(p[0] << 8 | p[1]);
}

static void put16(uint8_t *p, uint32_t value)
{
    p[0] = (uint8_t)(value >> 8);
    p[1] = (uint8_t)value;
}

static uint32_t get32(const uint8_t *p)
{
    return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static void put32(uint8_t *p, uint32_t value)
{
    put16(p, value >> 16);
    put16(p + 2, value & 0xffff);
}

/* The Internet checksum (RFC 1071): the sum of 16-bit words in network order, not yet folded. */
static uint64_t sum(const uint8_t *data, size_t size, uint64_t total)
{
    uint64_t words = 0; /* in the machine's order, which only swaps the bytes of the result */

    for (; size >= 4; data += 4, size -= 4) {
        uint32_t word;
        memcpy(&word, data, 4);
        words += word;
    }
    while (words >> 16)
        words = (words & 0xffff) + (words >> 16);
    uint16_t folded = (uint16_t)words;
    uint8_t bytes[2];
    memcpy(bytes, &folded, 2);
    total += get16(bytes);
    if (size >= 2) {
        total += get16(data);
        data += 2, size -= 2;
    }
    return size ? total + (uint32_t)(data[0] << 8) : total;
}

static uint16_t fold(uint64_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (uint16_t)~total;
}

bool net_gso_takes(uint32_t offloads, const uint8_t *message)
{
    struct virtio_net_hdr_v1 header;
    uint32_t needed = 0;

    memcpy(&header, message, HEADER);
    if (header.flags)
        needed |= NET_OFFLOAD_CSUM;
    if (header.gso_type & VIRTIO_NET_HDR_GSO_ECN)
        needed |= NET_OFFLOAD_ECN;
    switch (header.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        break;
    case VIRTIO_NET_HDR_GSO_TCPV4:
        needed |= NET_OFFLOAD_TSO4;
        break;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        needed |= NET_OFFLOAD_TSO6;
        break;
    default:
        return false;
    }
    return !(needed & ~offloads);
}

/* Where the headers of a TCP frame are, in bytes from its start. */
struct layout {
    size_t ip, tcp, data;
};

static bool find_headers(const uint8_t *frame, size_t size, uint8_t gso_type, size_t csum_start,
                         struct layout *layout)
{
    bool v6 = gso_type == VIRTIO_NET_HDR_GSO_TCPV6;

    if (size < ETH_SIZE + 4)
        return false;
    layout->ip = get16(frame + 12) == 0x8100 ? ETH_SIZE + 4 : ETH_SIZE;
    if (get16(frame + layout->ip - 2) != (v6 ? 0x86dd : 0x0800))
        return false;
    layout->tcp = csum_start;
    if (layout->tcp < layout->ip + (v6 ? 40 : 20) || layout->tcp + TCP_SIZE > size)
        return false;
    if (!v6 && (frame[layout->ip] >> 4 != 4 ||
                layout->ip + 4u * (frame[layout->ip] & 0xf) != layout->tcp))
        return false;
    size_t tcp_size = 4u * (frame[layout->tcp + 12] >> 4);
    layout->data = layout->tcp + tcp_size;
    return tcp_size >= TCP_SIZE && layout->data < size;
}

/* Makes the headers at the start of `frame`, copied from the large segment, those of one of `size`
 * bytes whose data begin `offset` bytes into the large one's. */
static void finish_segment(uint8_t *frame, size_t size, const struct layout *layout, bool v6,
                           uint32_t index, uint32_t offset, bool last)
{
    uint8_t *ip = frame + layout->ip, *tcp = frame + layout->tcp;
    size_t tcp_size = size - layout->tcp;
    uint64_t pseudo = IPPROTO_TCP + tcp_size;

    if (v6) {
        put16(ip + 4, (uint32_t)(size - layout->ip - 40));
        pseudo = sum(ip + 8, 32, pseudo);
    } else {
        put16(ip + 2, (uint32_t)(size - layout->ip));
        put16(ip + 4, get16(ip + 4) + index);
        put16(ip + 10, 0);
        put16(ip + 10, fold(sum(ip, layout->tcp - layout->ip, 0)));
        pseudo = sum(ip + 12, 8, pseudo);
    }
    put32(tcp + 4, get32(tcp + 4) + offset);
    if (!last)
        tcp[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
    if (index > 0)
        tcp[13] &= (uint8_t)~TCP_CWR; /* RFC 3168, 6.1.2: on the first alone */
    put16(tcp + 16, 0);
    put16(tcp + 16, fold(sum(tcp, tcp_size, pseudo)));
}

static bool cut(const struct virtio_net_hdr_v1 *header, const uint8_t *message, size_t size,
                net_gso_emit emit, void *opaque)
{
    uint8_t out[NET_MESSAGE_MAX];
    struct layout layout;
    uint8_t type = header->gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;
    const uint8_t *frame = message + HEADER;
    const size_t frame_size = size - HEADER;

    if ((type != VIRTIO_NET_HDR_GSO_TCPV4 && type != VIRTIO_NET_HDR_GSO_TCPV6) ||
        !(header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || header->gso_size == 0 ||
        !find_headers(frame, frame_size, type, header->csum_start, &layout))
        return false;

    const size_t data_size = frame_size - layout.data;
    if (data_size / header->gso_size >= MAX_SEGMENTS)
        return false;
    memset(out, 0, HEADER);
    uint32_t index = 0;
    for (size_t offset = 0; offset < data_size; offset += header->gso_size, index++) {
        size_t left = data_size - offset;
        size_t part = left < header->gso_size ? left : header->gso_size;

        memcpy(out + HEADER, frame, layout.data);
        memcpy(out + HEADER + layout.data, frame + layout.data + offset, part);
        finish_segment(out + HEADER, layout.data + part, &layout, type == VIRTIO_NET_HDR_GSO_TCPV6,
                       index, (uint32_t)offset, part == left);
        emit(opaque, out, HEADER + layout.data + part);
    }
    return true;
}

static bool add_checksum(const struct virtio_net_hdr_v1 *header, const uint8_t *message,
                         size_t size, net_gso_emit emit, void *opaque)
{
    uint8_t out[NET_MESSAGE_MAX];

    memset(out, 0, HEADER);
    memcpy(out + HEADER, message + HEADER, size - HEADER);
    if (header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        size_t start = HEADER + header->csum_start, field = start + header->csum_offset;

        if (field + 2 > size)
            return false;
        /* The field holds the sum of the pseudo header. In UDP 0 means "none" (RFC 768). */
        uint16_t checksum = fold(sum(out + start, size - start, 0));
        put16(out + field, checksum ? checksum : 0xffff);
    }
    emit(opaque, out, size);
    return true;
}

bool net_gso_complete(const uint8_t *message, size_t size, net_gso_emit emit, void *opaque)
{
    struct virtio_net_hdr_v1 header;

    if (size < HEADER || size > NET_MESSAGE_MAX)
        return false;
    memcpy(&header, message, HEADER);
    return (header.gso_type == VIRTIO_NET_HDR_GSO_NONE ? add_checksum : cut)(&header, message, size,
                                                                             emit, opaque);
}
