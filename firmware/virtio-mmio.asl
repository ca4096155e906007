/*
 * One virtio-mmio device. pyvmm/boot/acpi.py fills in the name, unique ID, address and interrupt,
 * which are recognisable values here, once for each device of a machine.
 *
 * LNRO0005 is the hardware ID that Linux gave the transport (drivers/virtio/virtio_mmio.c). _CCA is
 * mandatory for a device that does DMA: without it Linux on some architectures refuses DMA.
 */
DefinitionBlock ("virtio-mmio.aml", "SSDT", 2, "PYVMM ", "VIRTIO  ", 1)
{
    Scope (\_SB)
    {
        Device (VXXX)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0xA1A2A3A4)
            Name (_CCA, 1)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xB1B2B3B4, 0x1000)
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 0xC1C2C3C4 }
            })
        }
    }
}
