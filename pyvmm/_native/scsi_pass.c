#include "scsi_pass.h"

#include <string.h>

#define QUICK_SECONDS 30u
#define SLOW_SECONDS (24u * 3600)

enum {
    INQUIRY = 0x12,
    READ_10 = 0x28,
    WRITE_10 = 0x2A,
    WRITE_BUFFER = 0x3B,
    VARIABLE_LENGTH = 0x7F,
    THIRD_PARTY_COPY_OUT = 0x83,
    THIRD_PARTY_COPY_IN = 0x84,
    ATA_PASS_THROUGH_16 = 0x85,
    READ_16 = 0x88,
    WRITE_16 = 0x8A,
    ATA_PASS_THROUGH_12 = 0xA1,
    READ_12 = 0xA8,
    WRITE_12 = 0xAA,
};

/* Service action of ATA PASS-THROUGH(32), SAT-4. */
#define ATA_PASS_THROUGH_32 0x1FF0u

/* ATA8-ACS: both forms of the command. */
#define ATA_DOWNLOAD_MICROCODE 0x92
#define ATA_DOWNLOAD_MICROCODE_DMA 0x93

uint32_t scsi_pass_cdb_size(const uint8_t *cdb)
{
    static const uint8_t sizes[] = {6, 10, 10, 0, 16, 12, 0, 0}; /* by the opcode's group */
    uint32_t size = sizes[cdb[0] >> 5];

    if (size > 0)
        return size;
    if (cdb[0] == VARIABLE_LENGTH)
        return 8u + cdb[7];
    /* Of a vendor, or extended (7Eh). */
    size = 16;
    while (size > 10 && cdb[size - 1] == 0)
        size--;
    return size <= 10 ? 10 : size <= 12 ? 12 : 16;
}

static bool is_microcode_mode(uint8_t mode)
{
    return (mode >= 0x04 && mode <= 0x07) || (mode >= 0x0D && mode <= 0x0F);
}

static bool is_microcode_of_ata(uint8_t command)
{
    return command == ATA_DOWNLOAD_MICROCODE || command == ATA_DOWNLOAD_MICROCODE_DMA;
}

bool scsi_pass_refuses(struct scsi_command *command)
{
    const uint8_t *cdb = command->cdb;
    int byte = -1; /* the field that is refused */

    switch (cdb[0]) {
    case THIRD_PARTY_COPY_OUT:
    case THIRD_PARTY_COPY_IN:
        scsi_sense(command, SCSI_SENSE(0x5, 0x20, 0x00)); /* INVALID COMMAND OPERATION CODE */
        return true;
    case WRITE_BUFFER:
        byte = is_microcode_mode(cdb[1] & 0x1F) ? 1 : -1;
        break;
    case ATA_PASS_THROUGH_12:
        /* The same opcode is BLANK on CD drives, where this byte is reserved. */
        byte = is_microcode_of_ata(cdb[9]) ? 9 : -1;
        break;
    case ATA_PASS_THROUGH_16:
        byte = is_microcode_of_ata(cdb[14]) ? 14 : -1;
        break;
    case VARIABLE_LENGTH:
        if (scsi_pass_cdb_size(cdb) > command->cdb_size)
            byte = 7;
        else if (scsi_be16(cdb + 8) == ATA_PASS_THROUGH_32 && is_microcode_of_ata(cdb[25]))
            byte = 25;
        break;
    }
    if (byte < 0)
        return false;
    scsi_invalid_field(command, (uint32_t)byte, -1);
    return true;
}

/* Lowers a number of blocks, in which 0 stands for no limit. */
static void lower(uint8_t *field, uint32_t limit)
{
    uint32_t value = scsi_be32(field);

    if (value == 0 || value > limit)
        scsi_put_be32(field, limit);
}

static bool has_block_limits(uint8_t peripheral)
{
    switch (peripheral & 0x1F) {
    case 0x00: /* disk */
    case 0x04: /* write once */
    case 0x07: /* optical memory */
    case 0x0E: /* simplified disk */
    case 0x14: /* host managed zones */
        return true;
    }
    return false;
}

void scsi_pass_patch(const struct scsi_pass_limits *limits, const uint8_t *cdb, uint8_t *data,
                     uint32_t size)
{
    bool vital = cdb[1] & 0x01;

    if (cdb[0] != INQUIRY)
        return;
    if (!vital && size > 5)
        data[5] &= (uint8_t)~0x08; /* 3PC */
    if (vital && cdb[2] == 0xB0 && size >= 12 && data[1] == 0xB0 && has_block_limits(data[0]) &&
        limits->max_transfer > 0 && limits->block_size > 0) {
        uint32_t blocks = limits->max_transfer / limits->block_size;

        lower(data + 8, blocks); /* MAXIMUM TRANSFER LENGTH */
        if (size >= 16 && scsi_be32(data + 12) > 0)
            lower(data + 12, blocks); /* OPTIMAL TRANSFER LENGTH, where there is one */
    }
}

uint32_t scsi_pass_timeout(const uint8_t *cdb)
{
    switch (cdb[0]) {
    case 0x00: /* TEST UNIT READY */
    case 0x03: /* REQUEST SENSE */
    case INQUIRY:
    case 0x1A: /* MODE SENSE(6) */
    case 0x25: /* READ CAPACITY(10) */
    case READ_10:
    case WRITE_10:
    case 0x4D: /* LOG SENSE */
    case 0x5A: /* MODE SENSE(10) */
    case READ_16:
    case WRITE_16:
    case 0x9E: /* READ CAPACITY(16) and its like */
    case 0xA0: /* REPORT LUNS */
    case READ_12:
    case WRITE_12:
        return QUICK_SECONDS;
    }
    return SLOW_SECONDS; /* READ(6) and WRITE(6), too: on a tape they may have to search */
}

void scsi_pass_gather(const struct scsi_data *data, uint8_t *to)
{
    for (uint32_t i = 0; i < data->count; i++) {
        memcpy(to, data->iov[i].iov_base, data->iov[i].iov_len);
        to += data->iov[i].iov_len;
    }
}

void scsi_pass_scatter(const uint8_t *from, uint32_t size, const struct scsi_data *data)
{
    for (uint32_t i = 0; i < data->count && size > 0; i++) {
        uint32_t chunk = data->iov[i].iov_len < size ? (uint32_t)data->iov[i].iov_len : size;

        memcpy(data->iov[i].iov_base, from, chunk);
        from += chunk;
        size -= chunk;
    }
}
