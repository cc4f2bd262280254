"""Prepare data sets: manifests from official annotation files, smaller copies, optical flow. Nothing is downloaded.

    python -m data_prep kinetics600 --annotations ANNOTATIONS --videos VIDEOS --out k600.csv
    python -m data_prep ucf101 --videos VIDEOS --archive UCF101.rar --archive UCF101TrainTestSplits-RecognitionTask.zip --out ucf101.csv
    python -m data_prep transcode k600.csv --folder k600-256 --out k600-256.csv --short-side 256
    python -m data_prep flow k600-256.csv --folder k600-256-flow --method tvl1
    python -m data_prep summary k600.csv

Each can be stopped and started again; it goes on where it was. The work is done by attnnas.data.prepare and
attnnas.data.images, which a notebook can call.
"""
import argparse
import sys

from attnnas.core.errors import AttnnasError
from attnnas.data.flow import BOUND, METHODS, STORES
from attnnas.data.images import prepare_images
from attnnas.data.manifest import Manifest, summary_text
from attnnas.data.prepare import DATASETS, extract_flow, prepare, transcode


def _prepare(options) -> Manifest:
    return prepare(options.command, annotations=options.annotations, videos=options.videos, out=options.out,
                   archives=options.archive, workers=options.workers, full=not options.quick)


def _images(options) -> Manifest:
    return prepare_images(options.images, options.out, options.archive, workers=options.workers)


def _transcode(options) -> Manifest:
    return transcode(Manifest.load(options.manifest), options.folder, options.out, options.short_side, workers=options.workers)


def _flow(options):
    done = extract_flow(Manifest.load(options.manifest), options.folder, options.method, bound=options.bound, store=options.store,
                        short_side=options.short_side, workers=options.workers)
    print(f"flow of {done['videos']:,} videos, {done['flows']:,} frames; lost: {done['lost'] or 'none'}")


def parser() -> argparse.ArgumentParser:
    "The command line."
    main = argparse.ArgumentParser("data_prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, does: str, run, workers: bool = True):
        made = commands.add_parser(name, help=does, description=does)
        made.set_defaults(run=run)
        if workers: made.add_argument("--workers", type=int, help="processes; 0 works in this one (default: one a core)")
        return made

    for name, data in DATASETS.items():
        made = command(name, f"the manifest of {data.title}", _prepare)
        made.epilog = data.where
        made.add_argument("--annotations", help="folder of the official files (default: the folder of the videos)")
    for name, made in [*commands.choices.items(), ("folder", command("folder", "the manifest of a folder of classes", _prepare))]:
        made.add_argument("--videos", help="folder of the videos")
        made.add_argument("--archive", action="append", default=[], help="archive to unpack there first; may be given several times")
        made.add_argument("--out", help="manifest to write, .csv")
        made.add_argument("--quick", action="store_true", help="look at packets and the first frame only, instead of decoding all")
        made.set_defaults(annotations=None)
    made = command("images", "the manifest of Imagenette or of a folder of images", _images)
    made.add_argument("--images", required=True, help="folder of the images")
    made.add_argument("--archive", action="append", default=[], help="archive to unpack there first")
    made.add_argument("--out", required=True, help="manifest to write, .csv")
    made = command("transcode", "smaller copies of the videos of a manifest", _transcode)
    made.add_argument("manifest")
    made.add_argument("--folder", required=True, help="folder for the copies")
    made.add_argument("--out", required=True, help="manifest of the copies, .csv")
    made.add_argument("--short-side", type=int, default=256, help="pixels (default: 256)")
    made = command("flow", "optical flow of the videos of a manifest", _flow)
    made.add_argument("manifest")
    made.add_argument("--folder", required=True, help="folder for the flow files")
    made.add_argument("--method", default="tvl1", help=f"one of {', '.join(METHODS)} (default: tvl1)")
    made.add_argument("--bound", type=float, default=BOUND, help=f"pixels at which flow is clipped (default: {BOUND:g})")
    made.add_argument("--store", default="lossless", help=f"one of {', '.join(STORES)} (default: lossless)")
    made.add_argument("--short-side", type=int, help="compute it at this size (default: that of the videos)")
    made = command("summary", "what became of a data set", lambda options: Manifest.load(options.manifest), workers=False)
    made.add_argument("manifest")
    return main


def main(arguments=None) -> int:
    "Run a command; 2 where the reader can mend what is wrong."
    options = parser().parse_args(arguments)
    try: made = options.run(options)
    except AttnnasError as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return 2
    if made is not None: print(summary_text(made.summary()))
    return 0


if __name__ == "__main__": sys.exit(main())
