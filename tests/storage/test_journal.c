/* Checks storage/journal.c: whichever call fails, and wherever a process dies, the folder is one of
 * none, free, unfinished with the last commit, or finished, and is never taken for another. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "storage/file.h"
#include "storage/journal.h"
#include "tests/support/vfs_fault.h"

static char base[200], folder[256];

static int make_folder(void **state)
{
    const char *root = getenv("TMPDIR");

    (void)state;
    snprintf(base, sizeof base, "%s/annd-journal-XXXXXX", root ? root : "/var/tmp");
    if (!mkdtemp(base))
        return -1;
    snprintf(folder, sizeof folder, "%s/job", base);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), base, NULL);
}

static void start_afresh(void)
{
    assert_int_equal(file_remove_all(vfs_posix(), folder, NULL), 0);
}

static const char *path_in(const char *name)
{
    static char path[600];

    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static bool is_there(const char *name)
{
    return file_exists(vfs_posix(), path_in(name));
}

static void put_file(const char *name, const char *text)
{
    assert_int_equal(file_publish(vfs_posix(), path_in(name), text, strlen(text), NULL), 0);
}

static struct manifest *asked(void)
{
    struct manifest *m = manifest_new(MANIFEST_JOB);

    assert_non_null(m);
    assert_int_equal(manifest_set_text(m, "option.metric", "cosine", NULL), 0);
    return m;
}

static int create_in(struct vfs *vfs, struct journal **out, struct error *err)
{
    struct manifest *m = asked();
    int rc = journal_create(vfs, folder, m, out, err);

    manifest_free(m);
    return rc;
}

static struct journal *created(void)
{
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;

    if (create_in(vfs_posix(), &journal, &err) < 0)
        fail_msg("%s", err.message);
    return journal;
}

static void check_asked(const struct journal *journal)
{
    const char *text;

    assert_int_equal(manifest_get_text(journal_asked(journal), "option.metric", &text, NULL), 0);
    assert_string_equal(text, "cosine");
}

/* The value of entry "step", 0 where there is none. */
static uint64_t step_of(struct journal *journal)
{
    uint64_t step = 0;

    manifest_get_u64(journal_state(journal), "step", &step, NULL);
    return step;
}

static int commit_step(struct journal *journal, uint64_t step, struct error *err)
{
    if (manifest_set_u64(journal_state(journal), "step", step, err) < 0)
        return -1;
    return journal_commit(journal, err);
}

/* What another process finds: the code of journal_open(), and the step when that is ERR_NONE. */
static enum error_code found(uint64_t *step)
{
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;

    if (journal_open(vfs_posix(), folder, &journal, &err) < 0) {
        assert_null(journal);
        assert_true(err.message[0] != 0);
        return err.code;
    }
    check_asked(journal);
    *step = step_of(journal);
    journal_close(journal);
    return ERR_NONE;
}

static enum error_code found_code(void)
{
    uint64_t step;

    return found(&step);
}

static void test_what_was_asked_and_committed_comes_back(void **state)
{
    struct journal *journal;
    uint64_t step = 99;

    (void)state;
    start_afresh();
    assert_int_equal(found_code(), ERR_NOT_FOUND);
    assert_false(journal_exists(vfs_posix(), folder));
    journal = created();
    check_asked(journal);
    assert_true(journal_exists(vfs_posix(), folder));
    journal_close(journal);
    assert_int_equal(found(&step), ERR_NONE);
    assert_int_equal(step, 0);
    assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
    assert_int_equal(commit_step(journal, 1, NULL), 0);
    assert_int_equal(commit_step(journal, 2, NULL), 0);
    assert_true(journal_commit_age(journal) >= 0 && journal_commit_age(journal) < 60);
    assert_int_equal(manifest_set_u64(journal_state(journal), "step", 3, NULL), 0);
    journal_close(journal); /* not committed */
    assert_int_equal(found(&step), ERR_NONE);
    assert_int_equal(step, 2);
}

static void test_one_process_works_at_a_time(void **state)
{
    struct journal *journal, *second = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    start_afresh();
    journal = created();
    assert_int_equal(found_code(), ERR_BUSY);
    assert_int_equal(journal_discard(vfs_posix(), folder, &err), -1);
    assert_int_equal(err.code, ERR_BUSY);
    error_clear(&err);
    assert_int_equal(create_in(vfs_posix(), &second, &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    assert_true(is_there("build.job") && is_there("build.lock"));
    journal_close(journal);
    assert_int_equal(found_code(), ERR_NONE);
}

static void test_a_place_that_is_taken_is_left_alone(void **state)
{
    struct journal *journal = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    start_afresh();
    assert_true(journal_may_create(vfs_posix(), folder));
    assert_int_equal(file_mkdir(vfs_posix(), folder, NULL), 0);
    put_file("mine", "x");
    assert_false(journal_may_create(vfs_posix(), folder));
    assert_int_equal(create_in(vfs_posix(), &journal, &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    assert_true(is_there("mine"));
    assert_false(is_there("build.lock"));
    error_clear(&err);
    assert_int_equal(journal_discard(vfs_posix(), folder, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_false(is_there("build.lock"));
    /* Of that name, but none of ours: the rest of the folder is somebody's work. */
    error_clear(&err);
    put_file("build.job", "make: all\n");
    assert_int_equal(journal_discard(vfs_posix(), folder, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_true(is_there("mine") && is_there("build.job"));
    assert_false(is_there("build.lock"));
}

static void test_a_creation_that_died_leaves_the_place_free(void **state)
{
    (void)state;
    start_afresh();
    assert_int_equal(file_mkdir(vfs_posix(), folder, NULL), 0);
    journal_close(created());
    start_afresh();
    assert_int_equal(file_mkdir(vfs_posix(), folder, NULL), 0);
    put_file("build.lock", "");
    put_file("build.job.tmp", "ANND");
    assert_int_equal(found_code(), ERR_NOT_FOUND);
    journal_close(created());
    assert_int_equal(found_code(), ERR_NONE);
    assert_false(is_there("build.job.tmp"));
}

/* Each byte of a file flipped in turn, and each length it can be cut to. */
static void damage(const char *name, uint64_t *accepted)
{
    uint8_t *bytes;
    size_t count;

    assert_int_equal(file_read_whole(vfs_posix(), path_in(name), 1 << 20, &bytes, &count, NULL), 0);
    for (size_t i = 0; i < 2 * count; i++) {
        size_t kept = i < count ? count : i - count;

        if (i < count)
            bytes[i] ^= 0x10;
        assert_int_equal(file_remove_all(vfs_posix(), path_in(name), NULL), 0);
        struct vfs_file *file = file_open(vfs_posix(), path_in(name), VFS_WRITE | VFS_CREATE, NULL);

        assert_non_null(file);
        assert_int_equal(file_write_full(file, name, bytes, kept, 0, NULL), 0);
        assert_int_equal(file_close(file, name, NULL), 0);
        if (i < count)
            bytes[i] ^= 0x10;
        enum error_code code = found_code();

        /* A version or feature this program does not know is told as such. */
        if (code != ERR_CORRUPT && code != ERR_UNSUPPORTED)
            ++*accepted;
    }
    put_file(name, "");
    assert_int_equal(found_code(), ERR_CORRUPT);
    assert_int_equal(file_remove_all(vfs_posix(), path_in(name), NULL), 0);
    struct vfs_file *file = file_open(vfs_posix(), path_in(name), VFS_WRITE | VFS_CREATE, NULL);

    assert_int_equal(file_write_full(file, name, bytes, count, 0, NULL), 0);
    assert_int_equal(file_close(file, name, NULL), 0);
    assert_int_equal(found_code(), ERR_NONE);
    free(bytes);
}

static void test_every_damaged_byte_of_record_and_state_is_refused(void **state)
{
    struct journal *journal;
    uint64_t accepted = 0;
    uint8_t *bytes;
    size_t count;

    (void)state;
    start_afresh();
    journal = created();
    assert_int_equal(commit_step(journal, 7, NULL), 0);
    journal_close(journal);
    damage("build.job", &accepted);
    damage("build.state", &accepted);
    assert_int_equal(accepted, 0);
    /* The state in the record's place. */
    assert_int_equal(
        file_read_whole(vfs_posix(), path_in("build.state"), 1 << 20, &bytes, &count, NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path_in("build.job"), bytes, count, NULL), 0);
    free(bytes);
    assert_int_equal(found_code(), ERR_CORRUPT);
    /* A damaged one can be removed. */
    assert_int_equal(journal_discard(vfs_posix(), folder, NULL), 0);
    assert_false(file_exists(vfs_posix(), folder));
}

static void test_the_state_of_another_job_is_refused(void **state)
{
    struct journal *journal;
    struct manifest *other = manifest_new(MANIFEST_JOB);
    uint8_t *bytes;
    size_t count;

    (void)state;
    start_afresh();
    journal = created();
    assert_int_equal(commit_step(journal, 7, NULL), 0);
    journal_close(journal);
    assert_int_equal(
        file_read_whole(vfs_posix(), path_in("build.state"), 1 << 20, &bytes, &count, NULL), 0);
    start_afresh();
    assert_int_equal(manifest_set_text(other, "option.metric", "l2", NULL), 0);
    assert_int_equal(journal_create(vfs_posix(), folder, other, &journal, NULL), 0);
    journal_close(journal);
    assert_int_equal(file_publish(vfs_posix(), path_in("build.state"), bytes, count, NULL), 0);
    assert_int_equal(found_code(), ERR_CORRUPT);
    free(bytes);
    manifest_free(other);
}

static void test_status_is_replaced_whole_and_never_in_the_way(void **state)
{
    struct journal *journal;
    uint8_t *text;
    size_t bytes;

    (void)state;
    start_afresh();
    journal = created();
    journal_status(journal, "{\"phase\":\"read\"}\n");
    journal_status(journal, "{}\n");
    assert_int_equal(
        file_read_whole(vfs_posix(), path_in("build.status"), 1024, &text, &bytes, NULL), 0);
    assert_string_equal((char *)text, "{}\n");
    free(text);
    assert_false(is_there("build.status.tmp"));
    assert_int_equal(journal_finish(journal, NULL), 0);
    journal_status(journal, "{}\n"); /* too late: nothing is written */
    assert_false(is_there("build.status"));
    journal_close(journal);
}

static void test_a_finished_job_leaves_only_what_it_made(void **state)
{
    struct journal *journal;
    struct error err = ERROR_INIT;
    char path[FILE_PATH_MAX];
    char **names;
    uint32_t count;

    (void)state;
    start_afresh();
    journal = created();
    put_file("made", "x");
    assert_int_equal(journal_scratch_path(journal, "rows", path, NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path, "x", 1, NULL), 0);
    assert_int_equal(commit_step(journal, 1, NULL), 0);
    journal_status(journal, "{}");
    assert_int_equal(journal_finish(journal, NULL), 0);
    assert_int_equal(commit_step(journal, 2, &err), -1);
    journal_close(journal);
    assert_int_equal(file_list(vfs_posix(), folder, &names, &count, NULL), 0);
    assert_int_equal(count, 1);
    assert_string_equal(names[0], "made");
    file_names_free(names, count);
    assert_int_equal(found_code(), ERR_NOT_FOUND);
    assert_false(is_there("build.lock"));
}

/* ---- faults ---- */

/* A failed call alone, or the process dead from that call on, nothing cleaned up. */
static void plan_fault(struct vfs_fault *fault, uint64_t nth, bool dies)
{
    static const int errnos[] = {EIO, ENOSPC, EACCES};

    vfs_fault_plan(fault, &(struct vfs_fault_plan){
                              .nth = nth, .for_ever = dies, .errno_value = errnos[nth % 3]});
}

/* Must be called with no plan fired: closes what a dead process would have. */
static void close_dead(struct vfs_fault *fault, struct journal *journal)
{
    vfs_fault_plan(fault, NULL);
    journal_close(journal);
    assert_int_equal(vfs_fault_files_open(fault), 0);
}

static void test_creation_fails_without_a_trace_or_not_at_all(void **state)
{
    struct vfs_fault fault;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int dies = 0; dies < 2; dies++) {
        bool fired = true;

        for (uint64_t nth = 1; fired; nth++) {
            struct journal *journal = NULL;
            struct error err = ERROR_INIT;

            start_afresh();
            plan_fault(&fault, nth, dies);
            int rc = create_in(&fault.vfs, &journal, &err);

            fired = vfs_fault_fired(&fault) > 0;
            close_dead(&fault, journal);
            if (rc == 0) {
                assert_int_equal(found_code(), ERR_NONE);
                continue;
            }
            assert_true(err.code != ERR_NONE && err.message[0]);
            if (!dies) {
                assert_false(file_exists(vfs_posix(), folder));
                continue;
            }
            /* Died: it is there, or the place is free. */
            enum error_code code = found_code();

            assert_true(code == ERR_NONE || code == ERR_NOT_FOUND);
            if (code == ERR_NOT_FOUND) {
                assert_true(journal_may_create(vfs_posix(), folder));
                journal_close(created());
            }
        }
    }
    vfs_fault_release(&fault);
}

static void test_a_failed_open_is_no_other_answer(void **state)
{
    struct vfs_fault fault;
    struct journal *journal;
    bool fired = true;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    start_afresh();
    journal = created();
    assert_int_equal(commit_step(journal, 5, NULL), 0);
    journal_close(journal);
    for (uint64_t nth = 1; fired; nth++) {
        struct error err = ERROR_INIT;

        journal = NULL;
        plan_fault(&fault, nth, false);
        int rc = journal_open(&fault.vfs, folder, &journal, &err);

        fired = vfs_fault_fired(&fault) > 0;
        if (rc == 0)
            assert_int_equal(step_of(journal), 5);
        else
            assert_true(err.code == ERR_IO || err.code == ERR_NO_SPACE ||
                        err.code == ERR_PERMISSION);
        close_dead(&fault, journal);
        assert_int_equal(found_code(), ERR_NONE);
    }
    vfs_fault_release(&fault);
}

static void test_a_failed_commit_leaves_the_old_state_or_the_new(void **state)
{
    struct vfs_fault fault;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int dies = 0; dies < 2; dies++) {
        bool fired = true;

        for (uint64_t nth = 1; fired; nth++) {
            struct journal *journal;
            struct error err = ERROR_INIT;
            char path[FILE_PATH_MAX];
            uint64_t step = 0;

            start_afresh();
            vfs_fault_plan(&fault, NULL);
            assert_int_equal(create_in(&fault.vfs, &journal, NULL), 0);
            assert_int_equal(journal_scratch_path(journal, "rows", path, NULL), 0);
            assert_int_equal(commit_step(journal, 1, NULL), 0);
            plan_fault(&fault, nth, dies);
            int rc = commit_step(journal, 2, &err);

            fired = vfs_fault_fired(&fault) > 0;
            vfs_fault_plan(&fault, NULL);
            if (rc < 0) {
                /* No second try on what may not be as it seems. */
                assert_int_equal(commit_step(journal, 3, NULL), -1);
            }
            close_dead(&fault, journal);
            assert_int_equal(found(&step), ERR_NONE);
            assert_true(step == 2 || (rc < 0 && step == 1));
        }
    }
    vfs_fault_release(&fault);
}

/* A job with a scratch file its state speaks of, and something made. */
static struct journal *working(struct vfs *vfs)
{
    struct journal *journal = NULL;
    char path[FILE_PATH_MAX];

    start_afresh();
    assert_int_equal(create_in(vfs, &journal, NULL), 0);
    assert_int_equal(journal_scratch_path(journal, "rows", path, NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path, "x", 1, NULL), 0);
    assert_int_equal(commit_step(journal, 4, NULL), 0);
    journal_status(journal, "{}");
    put_file("made", "x");
    return journal;
}

static void test_a_failed_finish_can_be_done_again(void **state)
{
    struct vfs_fault fault;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int dies = 0; dies < 2; dies++) {
        bool fired = true;

        for (uint64_t nth = 1; fired; nth++) {
            struct error err = ERROR_INIT;
            struct journal *journal;
            uint64_t step = 0;

            vfs_fault_plan(&fault, NULL);
            journal = working(&fault.vfs);
            plan_fault(&fault, nth, dies);
            int rc = journal_finish(journal, &err);

            fired = vfs_fault_fired(&fault) > 0;
            close_dead(&fault, journal);
            assert_true(is_there("made"));
            enum error_code code = found(&step);

            assert_true(code == ERR_NOT_FOUND || (code == ERR_NONE && rc < 0));
            if (code == ERR_NONE) {
                /* A state never speaks of a scratch file that is gone. */
                assert_true(step == 0 || is_there("scratch/rows"));
                assert_int_equal(journal_open(vfs_posix(), folder, &journal, NULL), 0);
                assert_int_equal(journal_finish(journal, NULL), 0);
                journal_close(journal);
            }
            assert_false(is_there("build.lock") || is_there("build.state") ||
                         is_there("build.status") || is_there("build.job") || is_there("scratch"));
        }
    }
    vfs_fault_release(&fault);
}

static void test_a_failed_discard_can_be_done_again(void **state)
{
    struct vfs_fault fault;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int dies = 0; dies < 2; dies++) {
        bool fired = true;

        for (uint64_t nth = 1; fired; nth++) {
            struct error err = ERROR_INIT;
            uint64_t step = 0;

            vfs_fault_plan(&fault, NULL);
            journal_close(working(&fault.vfs));
            plan_fault(&fault, nth, dies);
            int rc = journal_discard(&fault.vfs, folder, &err);

            fired = vfs_fault_fired(&fault) > 0;
            close_dead(&fault, NULL);
            if (rc == 0) {
                assert_false(file_exists(vfs_posix(), folder));
                continue;
            }
            enum error_code code = found(&step);

            assert_true(code == ERR_NOT_FOUND || code == ERR_NONE);
            if (code == ERR_NONE) {
                assert_true(step == 0 || (is_there("scratch/rows") && is_there("made")));
                assert_int_equal(journal_discard(vfs_posix(), folder, NULL), 0);
                assert_false(file_exists(vfs_posix(), folder));
            } else {
                journal_close(created()); /* what is left of the folder is free */
            }
        }
    }
    vfs_fault_release(&fault);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_was_asked_and_committed_comes_back),
        cmocka_unit_test(test_one_process_works_at_a_time),
        cmocka_unit_test(test_a_place_that_is_taken_is_left_alone),
        cmocka_unit_test(test_a_creation_that_died_leaves_the_place_free),
        cmocka_unit_test(test_every_damaged_byte_of_record_and_state_is_refused),
        cmocka_unit_test(test_the_state_of_another_job_is_refused),
        cmocka_unit_test(test_status_is_replaced_whole_and_never_in_the_way),
        cmocka_unit_test(test_a_finished_job_leaves_only_what_it_made),
        cmocka_unit_test(test_creation_fails_without_a_trace_or_not_at_all),
        cmocka_unit_test(test_a_failed_open_is_no_other_answer),
        cmocka_unit_test(test_a_failed_commit_leaves_the_old_state_or_the_new),
        cmocka_unit_test(test_a_failed_finish_can_be_done_again),
        cmocka_unit_test(test_a_failed_discard_can_be_done_again),
    };

    return cmocka_run_group_tests_name("journal", tests, make_folder, remove_folder);
}
