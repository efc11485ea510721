//! What HTTP asks of the service of models.

use super::ModelsService;
use mlxnode_proto::v1::models_server::Models as _;
use mlxnode_proto::v1::{LoadAdapterRequest, UnloadAdapterRequest};
use tonic::{Request, Status};

/// Loads the adapter at `source` beside a model.
pub(crate) async fn load_adapter(
    models: &ModelsService,
    model: &str,
    source: String,
    name: &str,
) -> Result<(), Status> {
    let request = LoadAdapterRequest { model: model.to_owned(), source, name: name.to_owned() };
    models.load_adapter(Request::new(request)).await.map(drop)
}

/// Unloads an adapter of a model.
pub(crate) async fn unload_adapter(models: &ModelsService, model: &str, name: &str) -> Result<(), Status> {
    let request = UnloadAdapterRequest { model: model.to_owned(), name: name.to_owned() };
    models.unload_adapter(Request::new(request)).await.map(drop)
}
