class MlflowException(Exception):  # noqa: N818
    def __init__(self, message: str, error_code: str = "INTERNAL_ERROR"):
        super().__init__(message)
        self.message, self.error_code = message, error_code
