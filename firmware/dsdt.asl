/*
 * The fixed part of the machine. The virtio-mmio devices, of which each machine has its own number,
 * are in an SSDT made from virtio-mmio.asl.
 *
 * Compile with scripts/build-firmware, which makes layout.h from pyvmm/layout.py.
 */
#include "layout.h"

DefinitionBlock ("dsdt.aml", "DSDT", 2, "PYVMM ", "PYVMM   ", 1)
{
    /* ACPI 6.5, 7.4.2: the SLP_TYP values to write to PM1a and PM1b control for each sleep state. */
    Name (\_S0, Package () { 0, 0, 0, 0 })
    Name (\_S3, Package () { ACPI_S3_SLEEP_TYPE, ACPI_S3_SLEEP_TYPE, 0, 0 })
    Name (\_S5, Package () { ACPI_S5_SLEEP_TYPE, ACPI_S5_SLEEP_TYPE, 0, 0 })

    Scope (\_SB)
    {
        /* 16550A-compatible COM port. */
        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501"))
            Name (_UID, 1)
            Name (_STA, 0x0F)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, COM1_PORT, COM1_PORT, 1, 8)
                IRQNoFlags () { COM1_GSI }
            })
        }

        /* The real-time clock and CMOS memory: index and data port. */
        Device (RTC0)
        {
            Name (_HID, EisaId ("PNP0B00"))
            Name (_STA, 0x0F)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, CMOS_PORT, CMOS_PORT, 1, 2)
                IRQNoFlags () { RTC_GSI }
            })
        }

        /* One port to which a guest that panics writes why (QEMU, docs/specs/pvpanic.rst). */
        Device (PVPN)
        {
            Name (_HID, "QEMU0001")
            Name (_STA, 0x0F)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, PVPANIC_PORT, PVPANIC_PORT, 1, 1)
            })
        }
    }
}
