/* Manifest entries are taken as far as their numbers go without a gap: older segments, or a build
 * that was told which code to make, have none. */
#include "tools/field_facts.h"

#include <stdio.h>
#include <stdlib.h>

#define CALIBRATION_BYTES_MAX (16u << 20)

static int calibration_read(const struct segment *segment, uint32_t field,
                            struct walk_calibration **out, struct error *err)
{
    char name[SECTION_NAME_MAX];
    const struct segment_section *section;
    struct walk_calibration *calibration = NULL;
    uint8_t *bytes = NULL;
    int rc = -1;

    snprintf(name, sizeof name, "f%u.calibration", field);
    section = segment_find(segment, name);
    if (!section)
        return 0;
    if (section->payload_bytes > CALIBRATION_BYTES_MAX)
        return error_set(err, ERR_CORRUPT, "%s is %llu bytes long, wanted %u at most",
                         section->path, (unsigned long long)section->payload_bytes,
                         CALIBRATION_BYTES_MAX);
    bytes = malloc(section->payload_bytes ? section->payload_bytes : 1);
    calibration = malloc(sizeof *calibration);
    if (!bytes || !calibration) {
        error_set(err, ERR_NOMEM, "no memory for the calibration");
        goto done;
    }
    if (segment_read(segment, section, 0, section->payload_bytes, bytes, err) < 0 ||
        walk_calibration_decode(bytes, section->payload_bytes, section->path, calibration, err) < 0)
        goto done;
    *out = calibration;
    calibration = NULL; /* moved to the caller */
    rc = 0;
done:
    free(calibration);
    free(bytes);
    return rc;
}

int field_facts_read(const struct segment *segment, uint32_t field, struct field_facts *out,
                     struct error *err)
{
    const struct manifest *manifest = segment_manifest(segment);
    uint64_t rows = segment_row_count(segment), capacity;
    char entry[64];

    *out = (struct field_facts){0};
    for (uint32_t i = 0; i < CODE_TRIALS_MAX; i++) {
        snprintf(entry, sizeof entry, "field.%u.trial.%u", field, i);
        if (!manifest_has(manifest, entry))
            break;
        if (manifest_get_text(manifest, entry, &out->trials[i], err) < 0)
            return -1;
        out->trial_count++;
    }
    for (uint32_t i = 0; i < PAGE_LAYOUT_TIERS_MAX; i++) {
        snprintf(entry, sizeof entry, "field.%u.tier.%u", field, i);
        if (!manifest_has(manifest, entry))
            break;
        if (manifest_get_u64_in(manifest, entry, 0, rows, &out->tier_rows[i], err) < 0)
            return -1;
        out->tier_count++;
    }
    snprintf(entry, sizeof entry, "field.%u.page_capacity", field);
    if (manifest_get_u64_in(manifest, entry, 1, UINT32_MAX, &capacity, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "field.%u.cell_pages", field);
    if (manifest_get_u64_in(manifest, entry, 1, UINT32_MAX, &out->cell_pages, err) < 0)
        return -1;
    out->cell_count = (rows + capacity * out->cell_pages - 1) / (capacity * out->cell_pages);
    return calibration_read(segment, field, &out->calibration, err);
}

void field_facts_release(struct field_facts *facts)
{
    free(facts->calibration);
    *facts = (struct field_facts){0};
}
