/* What the targets that pass commands through to a foreign logical unit have in common: which
 * commands they keep from it, and what they change in its answers. */
#ifndef PYVMM_SCSI_PASS_H
#define PYVMM_SCSI_PASS_H

#include "scsi.h"

/* The largest transfer that is tried, as it takes that much memory of the monitor's. */
#define SCSI_PASS_MAX_BYTES (16u << 20)

/* What the way to the logical unit is narrower in than the logical unit itself. */
struct scsi_pass_limits {
    uint32_t max_transfer; /* bytes in one command; 0: no limit */
    uint32_t block_size;   /* bytes of a logical block; 0: there are none, or it is not known */
};

/* The size of the CDB by its first bytes (SPC-4, 4.2.5.1), as virtio sends padding with it. Of
 * opcodes that a vendor defines, whose size nobody else knows, it is one that drops nothing. */
uint32_t scsi_pass_cdb_size(const uint8_t *cdb);

/* Refuses what a guest must not do to a logical unit that it was lent, and answers it:
 *
 * - third-party copies (EXTENDED COPY and its kin, opcodes 83h and 84h): their parameter lists name
 *   other logical units, which the target may reach and the guest must not;
 * - new microcode (WRITE BUFFER, and ATA DOWNLOAD MICROCODE in an ATA PASS-THROUGH): it outlives
 *   the guest, and runs beside the logical units of others;
 * - a CDB that is longer than what was sent of it.
 *
 * All else passes, also what erases or locks the medium: that much was lent. */
bool scsi_pass_refuses(struct scsi_command *command);

/* Makes the `size` bytes of an answer to `cdb` tell of what has changed on the way: INQUIRY of no
 * third-party copies, its page B0h (SBC-3, 6.6.4) of no transfer above the limit. */
void scsi_pass_patch(const struct scsi_pass_limits *limits, const uint8_t *cdb, uint8_t *data,
                     uint32_t size);

/* How long the command may take before the way to the logical unit gives up on it, in seconds:
 * as long as drivers wait for what is quick, and a day for what may format a disk. Linux' driver of
 * virtio-scsi leaves it to the host to give up. */
uint32_t scsi_pass_timeout(const uint8_t *cdb);

/* Copies all of data-out to `to`; the first `size` bytes at `from` to data-in. */
void scsi_pass_gather(const struct scsi_data *data, uint8_t *to);
void scsi_pass_scatter(const uint8_t *from, uint32_t size, const struct scsi_data *data);

#endif
