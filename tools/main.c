/* annd: one program, verbs first. Data goes to stdout, everything else to stderr; the first line of
 * a message is the whole sentence. */
#include <errno.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "index/distance.h"
#include "index/gemm.h"
#include "tools/commands.h"

static const struct command *const commands[] = {
    &command_generate, &command_plan,   &command_build,  &command_resume,  &command_discard,
    &command_truth,    &command_search, &command_bench,  &command_inspect, &command_check,
    &command_attach,   &command_serve,  &command_doctor,
};

#define COMMAND_COUNT (sizeof commands / sizeof commands[0])

static void print_usage(FILE *out)
{
    fprintf(out, "annd keeps vectors on an SSD and finds the nearest ones.\n\nusage: annd VERB "
                 "[arguments]\n\nverbs:\n");
    for (size_t i = 0; i < COMMAND_COUNT; i++)
        fprintf(out, "  %-10s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(out, "\nannd VERB --help shows a verb's options; annd --version the version.\n"
                 "exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found, 5 refused "
                 "(memory, disk),\n  6 server not reachable, 9 busy, 75 interrupted (annd resume "
                 "goes on)\n");
}

static int exit_code_of(enum error_code code)
{
    switch (code) {
    case ERR_NONE:
        return EXIT_DONE;
    case ERR_INVALID:
        return EXIT_FAILED;
    case ERR_NOT_FOUND:
        return EXIT_MISSING;
    case ERR_CORRUPT:
        return EXIT_DAMAGE;
    case ERR_BUDGET:
        return EXIT_REFUSED;
    case ERR_BUSY:
        return EXIT_BUSY;
    case ERR_CANCELLED:
        return EXIT_INTERRUPTED;
    default:
        return EXIT_FAILED;
    }
}

int main(int argc, char **argv)
{
    struct arguments arguments;
    struct error err = ERROR_INIT;
    const struct command *command = NULL;
    const char *names[COMMAND_COUNT + 1] = {NULL};
    bool help;

    gemm_pick_core(argv); /* may start the program again: before anything else */
    setlocale(LC_ALL, "C");
    signal(SIGPIPE, SIG_IGN);
    if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") ||
        !strcmp(argv[1], "help")) {
        print_usage(argc < 2 ? stderr : stdout);
        return argc < 2 ? EXIT_USAGE : EXIT_DONE;
    }
    if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "version")) {
        printf("annd %s (%s kernels)\n", ANND_VERSION, distance_kernels_best()->name);
        return EXIT_DONE;
    }
    for (size_t i = 0; i < COMMAND_COUNT; i++) {
        names[i] = commands[i]->name;
        if (!strcmp(argv[1], commands[i]->name))
            command = commands[i];
    }
    if (!command) {
        const char *near = options_nearest(argv[1], names);

        fprintf(stderr, "annd: there is no verb '%s'\n", argv[1]);
        if (near)
            fprintf(stderr, "  did you mean: annd %s\n", near);
        else
            fprintf(stderr, "  annd --help lists the verbs\n");
        return EXIT_USAGE;
    }
    if (options_parse(command, argc - 2, argv + 2, &arguments, &help, &err) < 0) {
        fprintf(stderr, "annd: %s\n", err.message);
        return EXIT_USAGE;
    }
    if (help) {
        options_print_help(command);
        return EXIT_DONE;
    }
    int rc = command->run(&arguments, &err);

    /* A reader that has seen enough, such as `head`, is no failure of ours. */
    if (rc >= 0 && fflush(stdout) != 0 && errno != EPIPE)
        rc = error_set_errno(&err, errno, "writing the answer to stdout failed");
    if (rc < 0) {
        fprintf(stderr, "annd: %s\n", err.message);
        return exit_code_of(err.code);
    }
    return rc;
}
