"""`push_to_hub` of a trainer that somebody uses as a library."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from .weights import WeightsTrainer


class PushingTrainer(WeightsTrainer):
    """The part of `KavaTrainer` that sends the student when it is told to."""

    def push_to_hub(  # type: ignore[override]  # Trainer gives a future too, and says it does not
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Send the student as it is now, with its tokenizer and a card of Trainer's, to `hub_model_id`.

        Trainer's own would send all of `output_dir`, and its pickled arguments, which may hold a token, too. What
        `run_kava.py` measured goes to the hub with `python -m kava_trainer push`.

        Args:
            commit_message: of the commit.
            blocking: wait until all is sent.
            token: in place of `args.hub_token`, or of a login.
            revision: a branch, in place of `args.hub_revision`.
            private: of a repository that is made for it; `args.hub_private_repo` by default.
            kwargs: of `Trainer.create_model_card`.

        Returns:
            The commit, or its future where `blocking` is false; None on other ranks than the first.

        Raises:
            BadRequest: if there is no repository and none can be made.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        state = self.gathered_student()
        if not self.is_world_process_zero():
            return None
        folder = TemporaryDirectory()
        self.save_student(folder.name, state_dict=state)
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).split("/")[-1]
        self.create_model_card(model_name=name, **kwargs)
        shutil.copy(Path(str(self.args.output_dir)) / "README.md", folder.name)
        self._finish_current_push()
        sent: Future[CommitInfo] = HfApi(token=token).upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder.name,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
            run_as_future=True,
        )
        sent.add_done_callback(lambda _: folder.cleanup())
        return sent.result() if blocking else sent
